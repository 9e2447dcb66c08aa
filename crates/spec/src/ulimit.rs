/// Process limits by the names of Docker and of prlimit(1); the kernel's are RLIMIT_ and the same in upper case.
pub const ULIMITS: [&str; 16] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// A process limit by name, in any case.
#[must_use]
pub fn ulimit(name: &str) -> Option<&'static str> {
    ULIMITS.into_iter().find(|known| known.eq_ignore_ascii_case(name))
}
