/// Whether a path is absolute and says plainly where it leads: no empty, `.` or `..` component, no NUL, at most 4095 bytes
/// (PATH_MAX less its NUL). A slash at its end is not one of those.
#[must_use]
pub fn absolute(path: &str) -> bool {
    let Some(rest) = path.strip_prefix('/') else { return false };
    let plain = |component: &str| !component.is_empty() && component != "." && component != "..";
    path.len() < 4096 && !path.contains('\0') && (rest.is_empty() || rest.split('/').all(plain))
}

/// Whether a path is `directory` or below it; both as [`absolute`] allows them.
#[must_use]
pub fn inside(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || directory == "/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_mislead_are_told_apart() {
        for path in ["/", "/a", "/a/b.c/..d"] {
            assert!(absolute(path), "{path}");
        }
        for path in ["", "a", "/a/", "/a//b", "/a/../b", "/./a", "/a\0b", &format!("/{}", "a".repeat(4095))] {
            assert!(!absolute(path), "{path}");
        }
        assert!(inside("/proc/sys", "/proc") && inside("/proc", "/proc") && inside("/x", "/"));
        assert!(!inside("/process", "/proc") && !inside("/", "/proc"));
    }
}
