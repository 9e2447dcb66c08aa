/// A signal by name, with or without SIG, or by number: 1 to 63.
#[must_use]
pub fn signal(text: &str) -> Option<u32> {
    /// In their order from 1 on, as x86 and ARM number them.
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM",
        "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF",
        "WINCH", "IO", "PWR", "SYS",
    ];
    /// Linux's first real-time signal as glibc numbers it; RTMIN+3 is what systemd stops at.
    const RTMIN: u32 = 34;
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let offset: u32 = if offset.is_empty() { 0 } else { offset.strip_prefix('+')?.parse().ok()? };
        return Some(RTMIN).and_then(|first| first.checked_add(offset)).filter(|number| *number < 64);
    }
    let named = (1..).zip(NAMES).find(|(_, known)| *known == name).map(|(number, _)| number);
    named.or_else(|| name.parse().ok().filter(|number| (1..64).contains(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("usr1", 10),
            ("SIGTTOU", 22),
            ("SYS", 31),
            ("SEGV", 11),
        ] {
            assert_eq!(signal(text), Some(number), "{text}");
        }
        for text in ["", "0", "64", "SIGNOPE", "RTMIN+99", "RTMIN+4294967295", "-1"] {
            assert_eq!(signal(text), None, "{text}");
        }
    }
}
