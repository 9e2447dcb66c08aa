//! A reader of BTF, the kernel's type information: as much of it as finding fields' offsets takes.
//!
//! Format: Documentation/bpf/btf.rst in the kernel's tree. aya parses BTF too, but does not show members.

use std::collections::HashMap;

use super::Error;

const MAGIC: u16 = 0xeb9f;
const TYPE_LEN: usize = 12;
const MEMBER_LEN: usize = 12;

/// Kinds of types (`BTF_KIND_*`).
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

#[derive(Clone, Copy)]
struct Type {
    name: u32,
    info: u32,
    /// Size, or the type referred to.
    referred: u32,
    /// Where the kind's own data begins.
    body: usize,
}

impl Type {
    fn kind(self) -> u32 {
        (self.info >> 24) & 0x1f
    }

    fn len(self) -> usize {
        (self.info & 0xffff) as usize
    }
}

/// Parsed type information.
pub(super) struct Btf {
    types: Vec<Type>,
    data: Vec<u8>,
    strings: Vec<u8>,
    structs: HashMap<Vec<u8>, u32>,
    typedefs: HashMap<Vec<u8>, u32>,
}

impl Btf {
    /// Parses little- or big-endian BTF of this machine.
    pub(super) fn parse(raw: &[u8]) -> Result<Self, Error> {
        let malformed = || Error::Btf("malformed".to_owned());
        let header: [u32; 5] = {
            let magic = raw.get(..2).ok_or_else(malformed)?;
            if u16::from_ne_bytes([magic[0], magic[1]]) != MAGIC {
                return Err(Error::Btf("not BTF".to_owned()));
            }
            let mut words = [0; 5];
            for (i, word) in words.iter_mut().enumerate() {
                *word = word_at(raw, 4 + 4 * i).ok_or_else(malformed)?;
            }
            words
        };
        let [header_len, type_offset, type_len, string_offset, string_len] = header.map(|word| word as usize);
        let section = |offset: usize, len: usize| {
            let start = header_len.checked_add(offset)?;
            raw.get(start..start.checked_add(len)?).map(<[u8]>::to_vec)
        };
        let data = section(type_offset, type_len).ok_or_else(malformed)?;
        let strings = section(string_offset, string_len).ok_or_else(malformed)?;

        let void = Type { name: 0, info: 0, referred: 0, body: 0 };
        let mut btf = Self { types: vec![void], data, strings, structs: HashMap::new(), typedefs: HashMap::new() };
        let mut at = 0;
        while at < btf.data.len() {
            let word = |offset| word_at(&btf.data, at + offset).ok_or_else(malformed);
            let t = Type { name: word(0)?, info: word(4)?, referred: word(8)?, body: at + TYPE_LEN };
            let extra = match t.kind() {
                kind::INT | kind::VAR | kind::DECL_TAG => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * t.len(),
                kind::ENUM | kind::FUNC_PROTO => 8 * t.len(),
                kind::PTR..=kind::ENUM64 => 0,
                other => return Err(Error::Btf(format!("kind {other} is not known"))),
            };
            let id = btf.types.len() as u32;
            let name = btf.string(t.name).to_vec();
            if t.kind() == kind::STRUCT && !name.is_empty() {
                btf.structs.entry(name).or_insert(id);
            } else if t.kind() == kind::TYPEDEF {
                btf.typedefs.entry(name).or_insert(id);
            }
            btf.types.push(t);
            at += TYPE_LEN + extra;
        }
        Ok(btf)
    }

    fn string(&self, offset: u32) -> &[u8] {
        let rest = self.strings.get(offset as usize..).unwrap_or_default();
        rest.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    fn get(&self, id: u32) -> Option<Type> {
        self.types.get(id as usize).copied()
    }

    /// Follows typedefs and qualifiers.
    fn resolve(&self, mut id: u32) -> Option<Type> {
        // No real chain is as long; a loop would be.
        for _ in 0..32 {
            let t = self.get(id)?;
            match t.kind() {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => id = t.referred,
                _ => return Some(t),
            }
        }
        None
    }

    /// Offset in bytes of `member` in `struct name`, also through its anonymous members.
    pub(super) fn offset(&self, name: &str, member: &str) -> Result<u32, Error> {
        let missing = || Error::Btf(format!("no {member} in struct {name}"));
        let id = self.structs.get(name.as_bytes()).ok_or_else(missing)?;
        let bits = self.get(*id).and_then(|t| self.member_bits(t, member.as_bytes(), 0)).ok_or_else(missing)?;
        Ok(bits / 8)
    }

    fn member_bits(&self, t: Type, wanted: &[u8], depth: usize) -> Option<u32> {
        if depth > 8 {
            return None;
        }
        let has_bitfields = t.info >> 31 == 1;
        for i in 0..t.len() {
            let at = t.body + MEMBER_LEN * i;
            let name = word_at(&self.data, at)?;
            let offset = word_at(&self.data, at + 8)?;
            let offset = if has_bitfields { offset & 0x00ff_ffff } else { offset };
            if name != 0 {
                if self.string(name) == wanted {
                    return Some(offset);
                }
                continue;
            }
            let inner = self.resolve(word_at(&self.data, at + 4)?)?;
            if matches!(inner.kind(), kind::STRUCT | kind::UNION)
                && let Some(bits) = self.member_bits(inner, wanted, depth + 1)
            {
                return Some(offset + bits);
            }
        }
        None
    }

    /// Whether argument `n` of the BTF tracepoint `name` is a pointer; `None` when there is no such argument.
    pub(super) fn tracepoint_argument_is_pointer(&self, name: &str, n: usize) -> Option<bool> {
        let id = *self.typedefs.get(format!("btf_trace_{name}").as_bytes())?;
        let pointer = self.resolve(id)?;
        let prototype = self.resolve(pointer.referred)?;
        // The first parameter is the tracer's own.
        let parameter = n + 1;
        if prototype.kind() != kind::FUNC_PROTO || parameter >= prototype.len() {
            return None;
        }
        let t = self.resolve(word_at(&self.data, prototype.body + 8 * parameter + 4)?)?;
        Some(t.kind() == kind::PTR)
    }
}

fn word_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_is_refused() {
        for raw in [&b""[..], b"\x9f\xeb", b"ELF", &[0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 255, 255, 255, 255, 9, 9, 9, 9]] {
            assert!(Btf::parse(raw).is_err());
        }
    }

    /// Types: `int`, `struct inner { int a; }` (anonymous in the next), `struct outer { int x; struct {..}; }`.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0outer\0x\0a\0";
        let (int, outer, x, a) = (1u32, 5, 11, 13);
        let mut types: Vec<u32> = vec![int, 1 << 24, 4, 32];
        types.extend([0, (4 << 24) | 1, 4, a, 1, 0]);
        types.extend([outer, (4 << 24) | 2, 8, x, 1, 0, 0, 2, 32]);
        let types: Vec<u8> = types.into_iter().flat_map(u32::to_ne_bytes).collect();
        let mut raw = MAGIC.to_ne_bytes().to_vec();
        raw.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            raw.extend(word.to_ne_bytes());
        }
        raw.extend(types);
        raw.extend(strings);
        raw
    }

    #[test]
    fn members_are_found_through_anonymous_ones() {
        let btf = Btf::parse(&sample()).expect("well-formed");
        assert_eq!(btf.offset("outer", "x").expect("there"), 0);
        assert_eq!(btf.offset("outer", "a").expect("there"), 4);
        assert!(btf.offset("outer", "b").is_err());
        assert!(btf.offset("missing", "x").is_err());
    }
}
