//! A canonical form of JSON that keeps every digit of a number.

use std::collections::BTreeMap;

use serde::de::{self, Deserializer as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// A JSON pointer ([RFC 6901](https://www.rfc-editor.org/rfc/rfc6901)) to a member or an element.
#[derive(Clone, Debug)]
pub(super) struct Pointer(String);

impl Pointer {
    pub(super) fn parse(text: &str) -> Result<Self, InvalidPointer> {
        let well_formed = text.starts_with('/')
            && text
                .split('~')
                .skip(1)
                .all(|after_tilde| after_tilde.starts_with('0') || after_tilde.starts_with('1'));
        well_formed.then(|| Self(text.to_owned())).ok_or_else(|| InvalidPointer(text.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text is not a JSON pointer to a member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a JSON pointer to a member (RFC 6901): begin with a slash, write ~ as ~0 and / as ~1")]
pub struct InvalidPointer(String);

/// Writes the canonical form; `None` if the body is not JSON, repeats a member or nests too deeply.
pub(super) fn canonicalize(body: &[u8], excluded: &[Pointer]) -> Option<Vec<u8>> {
    let value: &RawValue = serde_json::from_slice(body).ok()?;
    let mut writer = Writer { out: Vec::with_capacity(body.len()), excluded, path: String::new() };
    writer.value(value, 0)?;
    Some(writer.out)
}

struct Writer<'a> {
    out: Vec<u8>,
    excluded: &'a [Pointer],
    path: String,
}

impl Writer<'_> {
    fn value(&mut self, value: &RawValue, depth: usize) -> Option<()> {
        let text = value.get();
        match text.as_bytes().first()? {
            b'{' | b'[' if depth == MAX_DEPTH => None,
            b'{' => self.object(text, depth),
            b'[' => self.array(text, depth),
            b'"' => self.string(&serde_json::from_str::<String>(text).ok()?),
            // A number as it is written: parsed as a float, two different amounts could become equal.
            _ => {
                self.out.extend_from_slice(text.as_bytes());
                Some(())
            }
        }
    }

    fn object(&mut self, text: &str, depth: usize) -> Option<()> {
        // Sorted by name, and `None` for a repeated one: parsers disagree about which of the two counts.
        let members = serde_json::Deserializer::from_str(text).deserialize_map(UniqueMembers).ok()?;
        self.out.push(b'{');
        for (name, value) in members {
            self.at(&name.replace('~', "~0").replace('/', "~1"), |writer| {
                writer.string(&name)?;
                writer.out.push(b':');
                writer.value(value, depth + 1)
            })?;
        }
        self.out.push(b'}');
        Some(())
    }

    fn array(&mut self, text: &str, depth: usize) -> Option<()> {
        let elements = serde_json::Deserializer::from_str(text).deserialize_seq(Elements).ok()?;
        self.out.push(b'[');
        for (index, value) in elements.into_iter().enumerate() {
            self.at(&index.to_string(), |writer| writer.value(value, depth + 1))?;
        }
        self.out.push(b']');
        Some(())
    }

    /// Writes the value one step further down, unless it is excluded.
    fn at(&mut self, step: &str, write: impl FnOnce(&mut Self) -> Option<()>) -> Option<()> {
        let length = self.path.len();
        self.path.push('/');
        self.path.push_str(step);
        let written = if self.excluded.iter().any(|pointer| pointer.0 == self.path) {
            Some(())
        } else {
            write(self).map(|()| self.out.push(b','))
        };
        self.path.truncate(length);
        written
    }

    fn string(&mut self, text: &str) -> Option<()> {
        serde_json::to_writer(&mut self.out, text).ok()
    }
}

struct UniqueMembers;

impl<'de> Visitor<'de> for UniqueMembers {
    type Value = BTreeMap<String, &'de RawValue>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = BTreeMap::new();
        while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
            if members.insert(name, value).is_some() {
                return Err(de::Error::custom("a member is repeated"));
            }
        }
        Ok(members)
    }
}

struct Elements;

impl<'de> Visitor<'de> for Elements {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(value) = seq.next_element()? {
            elements.push(value);
        }
        Ok(elements)
    }
}

/// Bounds the work: each level is scanned once more for each level above it.
const MAX_DEPTH: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(body: &str, excluded: &[&str]) -> Option<String> {
        let pointers: Vec<_> = excluded.iter().map(|text| Pointer::parse(text).unwrap()).collect();
        canonicalize(body.as_bytes(), &pointers).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn excluded_members_and_elements_leave_no_trace() {
        let with = canonical(r#"{"a":{"b~/c":1,"d":2},"e":[7,8]}"#, &["/a/b~0~1c", "/e/1"]);
        assert_eq!(with, canonical(r#"{"a":{"d":2},"e":[7]}"#, &[]));
    }

    #[test]
    fn what_is_ambiguous_has_no_canonical_form() {
        assert_eq!(canonical(r#"{"a":1,"a":2}"#, &[]), None);
        assert_eq!(canonical(r#"{"a":1}x"#, &[]), None);
        assert_eq!(canonical("", &[]), None);
        assert_eq!(canonical(&format!("{}{}", "[".repeat(33), "]".repeat(33)), &[]), None);
        assert!(canonical(&format!("{}{}", "[".repeat(32), "]".repeat(32)), &[]).is_some());
    }

    #[test]
    fn structure_is_not_lost() {
        assert_ne!(canonical(r#"[[1],2]"#, &[]), canonical(r#"[[1,2]]"#, &[]));
        assert_ne!(canonical(r#"{"a":"1"}"#, &[]), canonical(r#"{"a":1}"#, &[]));
    }

    #[test]
    fn bad_pointers_are_named() {
        for text in ["", "a", "/a~2", "/a~"] {
            assert_eq!(Pointer::parse(text).unwrap_err(), InvalidPointer(text.to_owned()));
        }
    }
}
