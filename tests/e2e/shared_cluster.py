"""The cluster and the configuration of the demos that many tests share."""

CLUSTER = """
[[clusters]]
name = "e2e.test"
proxy_addr = "teleport.e2e.test:3080"
custom_dns_zones = ["corp.example.test"]

[[clusters.apps]]
name = "page"
uri = "tcp://hello.backend.internal:80"

[[clusters.apps]]
name = "page-in-zone"
uri = "tcp://hello.backend.internal:80"
public_addr = "page.corp.example.test"

[[clusters.apps]]
name = "web"
uri = "http://127.0.0.1:8080"

[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"

[[clusters.apps]]
name = "ports"
uri = "tcp://ports.backend.internal"
tcp_ports = [{ port = 8000, end_port = 8010 }]

[[clusters.apps]]
name = "pg"
uri = "tcp://127.0.0.1:5432"
public_addr = "pg.corp.example.test"

[[clusters.apps]]
name = "redis"
uri = "tcp://127.0.0.1:6379"

[[clusters.apps]]
name = "iperf"
uri = "tcp://127.0.0.1"
tcp_ports = [{ port = 5201 }]

[[clusters.apps]]
name = "own"
uri = "tcp://127.0.0.1:7001"

[[clusters.apps]]
name = "nobody"
uri = "tcp://127.0.0.1:9"
"""
# Tests kill workers on purpose: the supervisor must not give them up, nor wait longer each time.
CONFIG = """
[supervisor]
restart_max = 1000
restart_window_seconds = 1
"""
