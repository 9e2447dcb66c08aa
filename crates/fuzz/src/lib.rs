//! Inputs for parsers of what strangers send: good ones that were damaged, the same each time. In tests, thousands; a million with
//! `cargo xtask fuzz`.

use std::time::{Duration, Instant};

use rand::{Rng as _, SeedableRng as _};
use rand_xoshiro::Xoshiro256PlusPlus;

/// Says how many inputs each test has.
pub const INPUTS: &str = "WARREN_FUZZ_INPUTS";
/// Unless that says otherwise.
const FEW: u64 = 20_000;
/// No input is larger.
const LARGEST: usize = 64 << 10;
/// A parser that is busy with one for so long will be for ever.
const HANGS: Duration = Duration::from_secs(10);

/// Gives `parse` inputs made from good ones.
///
/// # Panics
///
/// When `parse` does, with the input; when it hangs; without a good input.
pub fn fuzz(good: &[&[u8]], mut parse: impl FnMut(&[u8])) {
    assert!(!good.is_empty(), "something is to be damaged");
    let count = std::env::var(INPUTS).ok().and_then(|count| count.parse().ok()).unwrap_or(FEW);
    let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
    for number in 0..count {
        let input = damaged(good, &mut random);
        let shown = Shown(number, &input);
        let began = Instant::now();
        parse(&input);
        assert!(began.elapsed() < HANGS, "input {number} took {:?}", began.elapsed());
        std::mem::forget(shown);
    }
}

/// Shows an input if what is done with it panics.
struct Shown<'a>(u64, &'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        eprintln!("input {} was {:?}", self.0, self.1.escape_ascii().to_string());
    }
}

fn damaged(good: &[&[u8]], random: &mut Xoshiro256PlusPlus) -> Vec<u8> {
    let mut input = good[random.random_range(0..good.len())].to_vec();
    for _ in 0..random.random_range(1..=8) {
        let at = random.random_range(0..=input.len());
        let end = (at + random.random_range(0..=32)).min(input.len());
        match random.random_range(0..9) {
            0 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
            1 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xc0, 0xff, b'"', b'\n'][random.random_range(0..8)],
            2 => input.truncate(at),
            3 => drop(input.drain(at..end)),
            4 => {
                let again = input[at..end].repeat(random.random_range(1..=64));
                input.splice(at..at, again);
            }
            5 => {
                let other = good[random.random_range(0..good.len())];
                let from = random.random_range(0..=other.len());
                input.splice(at..at, other[from..].iter().copied());
            }
            6 => {
                let extreme = [u64::MAX, 1 << 63, 1 << 31, 0][random.random_range(0..4)].to_be_bytes();
                let width = [1, 2, 4, 8][random.random_range(0..4)];
                let end = (at + width).min(input.len());
                input.splice(at..end, extreme[8 - width..].iter().copied());
            }
            7 => input.insert(at, random.random()),
            _ => {
                let number =
                    [&b"-1"[..], b"18446744073709551616", b"1e999", b"null", b"[[[[[[[["][random.random_range(0..5)];
                input.splice(at..at, number.iter().copied());
            }
        }
        input.truncate(LARGEST);
    }
    input
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_the_same_each_time_and_not_all_alike() {
        let some = || {
            let mut seen = Vec::new();
            let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
            seen.extend((0..1000).map(|_| damaged(&[b"{\"a\": 1}", b"other"], &mut random)));
            seen
        };
        let (first, second) = (some(), some());
        assert_eq!(first, second);
        let distinct: std::collections::BTreeSet<_> = first.iter().collect();
        assert!(distinct.len() > 800, "{}", distinct.len());
    }

    #[test]
    #[should_panic(expected = "one of them")]
    fn what_panics_is_found() {
        fuzz(&[b"abc"], |input| assert!(!input.contains(&0xff), "one of them"));
    }
}
