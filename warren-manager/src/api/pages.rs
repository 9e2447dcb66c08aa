//! Lists in pages. A token is the key of the last object of the page before, so that what is added or removed meanwhile
//! neither repeats nor hides others.

use prost::Message;

use super::Error;

const DEFAULT_SIZE: usize = 1000;
const MAX_SIZE: usize = 10_000;

/// Bytes of a page: clients take messages of 4 MiB unless they are told otherwise, and one object may be a large one.
const MAX_BYTES: usize = 2 << 20;

/// A page of `objects`, which are sorted by `key`, as `shown`, and the token of the next, empty if there is none.
pub(super) fn page<T, W: Message>(
    objects: impl IntoIterator<Item = T>,
    key: impl Fn(&T) -> String,
    (size, token): (u32, &str),
    mut shown: impl FnMut(T) -> Result<W, Error>,
) -> Result<(Vec<W>, String), Error> {
    let after = token.strip_prefix("after:");
    if !token.is_empty() && after.is_none() {
        return Err(Error::PageToken);
    }
    let size = match size as usize {
        0 => DEFAULT_SIZE,
        size => size.min(MAX_SIZE),
    };
    let mut rest =
        objects.into_iter().filter(|object| after.is_none_or(|after| key(object).as_str() > after)).peekable();
    let (mut page, mut bytes, mut last) = (Vec::new(), 0, String::new());
    while page.len() < size
        && bytes < MAX_BYTES
        && let Some(object) = rest.next()
    {
        last = key(&object);
        let object = shown(object)?;
        bytes += object.encoded_len();
        page.push(object);
    }
    let next = if rest.peek().is_some() { format!("after:{last}") } else { String::new() };
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
            let (part, next) = page(all.clone(), String::clone, (10, token.as_str()), Ok).expect("a page");
            assert!(part.len() <= 10);
            seen.extend(part);
            token = next;
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(seen, all);
        assert!(matches!(page(all, String::clone, (10, "nonsense"), Ok), Err(Error::PageToken)));
    }

    #[test]
    fn pages_are_not_too_large_for_a_message() {
        // A String is a message of its own length and a little.
        let all: Vec<String> = (0..80).map(|i| format!("{i:02}{}", "x".repeat(60_000))).collect();
        let (mut pages, mut seen, mut token) = (0, Vec::new(), String::new());
        loop {
            let (part, next) = page(all.clone(), String::clone, (0, token.as_str()), Ok).expect("a page");
            assert!(part.iter().map(String::len).sum::<usize>() < 4 << 20);
            (pages, token) = (pages + 1, next);
            seen.extend(part);
            if token.is_empty() {
                break;
            }
        }
        assert_eq!((pages, seen == all), (3, true));
    }
}
