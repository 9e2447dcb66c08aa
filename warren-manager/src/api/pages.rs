//! Lists in pages. A token is the key of the last object of the page before, so that what is added or removed meanwhile
//! neither repeats nor hides others.

use super::Error;

const DEFAULT_SIZE: usize = 1000;
const MAX_SIZE: usize = 10_000;

/// A page of `objects`, which are sorted by `key`, and the token of the next, empty if there is none.
pub(super) fn page<T>(
    objects: impl IntoIterator<Item = T>,
    key: impl Fn(&T) -> String,
    size: u32,
    token: &str,
) -> Result<(Vec<T>, String), Error> {
    let after = token.strip_prefix("after:");
    if !token.is_empty() && after.is_none() {
        return Err(Error::PageToken);
    }
    let size = match size as usize {
        0 => DEFAULT_SIZE,
        size => size.min(MAX_SIZE),
    };
    let mut rest = objects.into_iter().filter(|object| after.is_none_or(|after| key(object).as_str() > after));
    let page: Vec<T> = rest.by_ref().take(size).collect();
    let next = match (rest.next(), page.last()) {
        (Some(_), Some(last)) => format!("after:{}", key(last)),
        _ => String::new(),
    };
    Ok((page, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_hold_everything_once() {
        let all: Vec<String> = (0..25).map(|i| format!("{i:02}")).collect();
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let (part, next) = page(all.clone(), String::clone, 10, &token).expect("a page");
            assert!(part.len() <= 10);
            seen.extend(part);
            token = next;
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(seen, all);
        assert!(matches!(page(all, String::clone, 10, "nonsense"), Err(Error::PageToken)));
    }
}
