"""What a real sshd needs to be a node of an embedded cluster, in the tsh home.

<home>/nodes/<hostname>.<cluster>/ssh_host_key            its host key
<home>/nodes/<hostname>.<cluster>/ssh_host_key-cert.pub   certificate of the cluster's host CA
<home>/nodes/<hostname>.<cluster>/user_ca.pub             TrustedUserCAKeys

    sshd -D -h ssh_host_key -o HostCertificate=ssh_host_key-cert.pub -o TrustedUserCAKeys=user_ca.pub
"""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ed25519

from demo.cluster.config import Node
from demo.cluster.home import write_file
from demo.cluster.ssh_access import issue_host_certificate, user_authorities
from demo.cluster.sshcert import private_key_openssh
from demo.cluster.state import ClusterState

DIRECTORY = "nodes"


def write_node_files(
    home: Path, state: ClusterState, node: Node, key: ed25519.Ed25519PrivateKey
) -> None:
    """Writes the files of one node, each in one step. Raises OSError."""
    twins = [other for other in state.config.nodes if other.hostname == node.hostname]
    name = node.hostname if twins[0] is node else node.uuid
    directory = home / DIRECTORY / f"{name}.{state.name}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(directory / "ssh_host_key", private_key_openssh(key))
    certificate = issue_host_certificate(state, node, key.public_key())
    write_file(directory / "ssh_host_key-cert.pub", certificate + b"\n")
    authorities = b"".join(line + b"\n" for line in user_authorities(state))
    write_file(directory / "user_ca.pub", authorities)
