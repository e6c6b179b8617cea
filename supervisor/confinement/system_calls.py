"""Which system calls a worker may make, by role. Pure.

The lists were found by running all tests with `VNET_SECCOMP=log` (see docs/architecture.md). What is in
none of them fails with EPERM; what no worker of any version needs ends the process. Names that a
machine does not have are skipped.
"""

import errno
from dataclasses import dataclass
from typing import Final

from ipc.permits import Role

# uname(2) machine names for which the lists hold.
MACHINES: Final = ("x86_64", "aarch64")


@dataclass(frozen=True, slots=True)
class Condition:
    """Holds when `argument & mask == value`; arguments count from 0."""

    argument: int
    value: int
    mask: int = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that is allowed when all conditions hold; several of one name are alternatives."""

    name: str
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class CallList:
    """The calls of a role, those that are made for each packet first.

    `absent` fail as on a kernel that does not have them, so that libraries take the older way;
    `lethal` end the process.
    """

    allowed: tuple[Call, ...]
    absent: tuple[str, ...]
    lethal: tuple[str, ...]


def _calls(names: str) -> tuple[Call, ...]:
    return tuple(map(Call, names.split()))


def _either(
    name: str, argument: int, values: tuple[int, ...], mask: int = 2**64 - 1
) -> tuple[Call, ...]:
    return tuple(Call(name, (Condition(argument, value, mask),)) for value in values)


# asm-generic/mman-common.h
_PROT_WRITE: Final = 2
_PROT_EXEC: Final = 4
# linux/sched.h
_CLONE_THREAD: Final = 0x10000
# linux/prctl.h
_PR_SET_NAME: Final = 15
# asm-generic/ioctls.h: TCGETS (is it a terminal?), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_IOCTLS: Final = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)
# asm-generic/fcntl.h, linux/fcntl.h: F_DUPFD to F_SETLKW, F_OFD_GETLK to F_OFD_SETLKW,
# F_DUPFD_CLOEXEC, F_SETPIPE_SZ, F_GETPIPE_SZ; none that sends signals.
_FCNTLS: Final = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032)
# linux/fcntl.h: fstat(2) of newer C libraries
_AT_EMPTY_PATH: Final = 0x1000
# asm-generic/fcntl.h: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_CHANGES_FILES: Final = 0o1103
# linux/socket.h
_AF_UNIX: Final = 1
_AF_INET: Final = 2
_AF_INET6: Final = 10
_SOCK_STREAM: Final = 1
_SOCK_DGRAM: Final = 2
_SOCK_TYPE: Final = 0xF

_HOT: Final = _calls(
    "read write epoll_pwait epoll_wait readv writev recvfrom sendto recvmsg sendmsg futex poll"
    " epoll_ctl getpid clock_gettime sched_yield accept4 close getsockopt setsockopt"
)
_COMMON: Final = (
    *_HOT,
    *_calls(
        # memory
        "brk munmap mremap madvise membarrier mlock munlock"
        # threads and signals of its own
        " set_robust_list get_robust_list rseq set_tid_address sched_getaffinity gettid sched_getparam"
        " sched_getscheduler sched_setscheduler"
        " rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall exit exit_group"
        # waiting and time
        " ppoll select pselect6 epoll_create1 epoll_pwait2 eventfd2 pipe2 timerfd_create"
        " timerfd_settime nanosleep clock_nanosleep clock_getres gettimeofday time"
        # descriptors it has
        " fstat lseek dup dup3 socketpair shutdown getsockname getpeername recvmmsg sendmmsg"
        # who and where it is
        " getppid getuid geteuid getgid getegid getresuid getresgid uname sysinfo getrusage times"
        " getcpu umask getrandom"
    ),
    *_either("ioctl", 1, _IOCTLS),
    *_either("fcntl", 1, _FCNTLS),
    *_either("prctl", 0, (_PR_SET_NAME,)),
    # Its own limits.
    *_either("prlimit64", 0, (0,)),
    Call("getrlimit"),
    # A thread; glibc makes one this way when clone3 is missing.
    *_either("clone", 0, (_CLONE_THREAD,), _CLONE_THREAD),
    # Memory that holds programs is there already.
    *_either("mprotect", 2, (0,), _PROT_EXEC),
    *_either("mmap", 2, (0,), _PROT_EXEC),
)
_STAT_OF_DESCRIPTOR: Final = _either("newfstatat", 3, (_AT_EMPTY_PATH,), _AT_EMPTY_PATH)


def _socket(family: int, kind: int) -> Call:
    return Call("socket", (Condition(0, family), Condition(1, kind, _SOCK_TYPE)))


_DNS: Final = (
    _socket(_AF_UNIX, _SOCK_STREAM),
    *(_socket(af, kind) for af in (_AF_INET, _AF_INET6) for kind in (_SOCK_STREAM, _SOCK_DGRAM)),
    *_calls("connect listen"),
)
_PROXY: Final = (
    *_DNS,
    *_calls(
        # the sockets of prompts
        "bind"
        # reading files: credentials, TLS trust, resolver settings, name service libraries
        " openat open openat2 newfstatat stat lstat statx access faccessat faccessat2"
        " readlink readlinkat getdents64 getcwd pread64 fadvise64 statfs fstatfs"
        # the address book, the prompts
        " pwrite64 fsync fdatasync ftruncate fallocate flock unlink unlinkat rename renameat"
        " renameat2 fchmod chmod fchmodat"
        # keys in memory, changes of the tsh home
        " memfd_create inotify_init1 inotify_add_watch inotify_rm_watch"
    ),
    # Libraries of the name service are loaded at their first use; nothing is both written and run.
    *_either("mmap", 2, (0,), _PROT_WRITE),
)
_ABSENT: Final = ("clone3", "io_uring_setup", "io_uring_enter", "io_uring_register", "fchmodat2")
# fmt: off
_LETHAL: Final = (
    "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "mount",
    "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount",
    "fspick", "mount_setattr", "bpf", "perf_event_open", "userfaultfd", "init_module",
    "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon",
    "swapoff", "acct", "quotactl", "syslog", "iopl", "ioperm", "settimeofday", "clock_settime",
    "sethostname", "setdomainname", "keyctl", "add_key", "request_key", "setns", "unshare",
    "open_by_handle_at", "mknod", "mknodat",
)
# fmt: on


def call_list(role: Role, pid: int) -> CallList:
    """The calls of a role; `pid` is the process's own, the only one it may signal."""
    own_signals = _either("tgkill", 0, (pid,))
    match role:
        case Role.TUN:
            # A limit for what it does when its supervisor has died.
            extra = (*_STAT_OF_DESCRIPTOR, *_calls("setitimer getitimer"))
        case Role.DNS:
            # What is open to it is for Landlock to say: /dev/null.
            extra = (*_DNS, *_STAT_OF_DESCRIPTOR, *_either("openat", 2, (0,), _CHANGES_FILES))
        case Role.METRICS:
            # It accepts at the socket that it was given, and makes none.
            extra = (Call("listen"), *_STAT_OF_DESCRIPTOR)
        case _:
            extra = _PROXY
    return CallList((*_COMMON, *own_signals, *extra), _ABSENT, _LETHAL)


ABSENT_ERRNO: Final = errno.ENOSYS
REFUSED_ERRNO: Final = errno.EPERM
