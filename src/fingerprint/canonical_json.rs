//! A canonical form of JSON that keeps every digit of a number.

use std::collections::BTreeMap;

/// A JSON pointer ([RFC 6901](https://www.rfc-editor.org/rfc/rfc6901)) to a member or an element.
#[derive(Clone, Debug)]
pub(crate) struct Pointer(String);

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

/// Writes the canonical form; `None` if the body is not JSON ([RFC 8259]), repeats a member or
/// nests too deeply.
///
/// [RFC 8259]: https://www.rfc-editor.org/rfc/rfc8259
pub(crate) fn canonicalize(body: &[u8], excluded: &[Pointer]) -> Option<Vec<u8>> {
    let mut reader = Reader { rest: std::str::from_utf8(body).ok()?, excluded, path: String::new() };
    let mut out = Vec::with_capacity(body.len());
    reader.value(&mut out, 0)?;
    reader.rest.is_empty().then_some(out)
}

/// Reads strictly: a lenient reader would take for equal what the handler's parser reads otherwise.
struct Reader<'a> {
    rest: &'a str,
    excluded: &'a [Pointer],
    path: String,
}

impl<'a> Reader<'a> {
    /// Reads a value with the blanks around it.
    fn value(&mut self, out: &mut Vec<u8>, depth: usize) -> Option<()> {
        self.skip_blanks();
        match self.rest.bytes().next()? {
            b'{' | b'[' if depth == MAX_DEPTH => return None,
            b'{' => self.object(out, depth)?,
            b'[' => self.array(out, depth)?,
            b'"' => write_string(out, &self.string()?)?,
            b'-' | b'0'..=b'9' => out.extend(self.number()?.as_bytes()),
            _ => out.extend(self.literal()?.as_bytes()),
        }
        self.skip_blanks();
        Some(())
    }

    fn object(&mut self, out: &mut Vec<u8>, depth: usize) -> Option<()> {
        let mut members = BTreeMap::new();
        self.each(b'{', b'}', |reader, _| {
            reader.skip_blanks();
            let name = reader.string()?;
            reader.skip_blanks();
            reader.expect(b':')?;
            let step = name.replace('~', "~0").replace('/', "~1");
            let value = reader.at(&step, depth)?;
            // Parsers disagree about which of two members with one name counts.
            members.insert(name, value).is_none().then_some(())
        })?;
        out.push(b'{');
        for (name, value) in members.into_iter().filter_map(|(name, value)| Some((name, value?))) {
            write_string(out, &name)?;
            out.push(b':');
            out.extend(value);
            out.push(b',');
        }
        out.push(b'}');
        Some(())
    }

    fn array(&mut self, out: &mut Vec<u8>, depth: usize) -> Option<()> {
        out.push(b'[');
        self.each(b'[', b']', |reader, index| {
            if let Some(value) = reader.at(&index.to_string(), depth)? {
                out.extend(value);
                out.push(b',');
            }
            Some(())
        })?;
        out.push(b']');
        Some(())
    }

    /// Reads what stands between brackets, with commas between.
    fn each(
        &mut self,
        open: u8,
        close: u8,
        mut read: impl FnMut(&mut Self, usize) -> Option<()>,
    ) -> Option<()> {
        self.expect(open)?;
        self.skip_blanks();
        if self.eat(close) {
            return Some(());
        }
        for index in 0.. {
            read(self, index)?;
            if self.eat(close) {
                return Some(());
            }
            self.expect(b',')?;
        }
        None
    }

    /// Reads the value one step further down: `Some(None)` if it is excluded.
    fn at(&mut self, step: &str, depth: usize) -> Option<Option<Vec<u8>>> {
        let length = self.path.len();
        self.path.push('/');
        self.path.push_str(step);
        let is_excluded = self.excluded.iter().any(|pointer| pointer.0 == self.path);
        let mut value = Vec::new();
        self.value(&mut value, depth + 1)?;
        self.path.truncate(length);
        Some((!is_excluded).then_some(value))
    }

    fn string(&mut self) -> Option<String> {
        let bytes = self.rest.as_bytes();
        let mut end = 1;
        loop {
            match bytes.get(end)? {
                b'"' => break,
                b'\\' => end += 2,
                _ => end += 1,
            }
        }
        serde_json::from_str(self.take(end + 1)?).ok()
    }

    /// A number as it is written: parsed as a float, two different amounts could become equal.
    fn number(&mut self) -> Option<&'a str> {
        let is_part = |byte: &u8| byte.is_ascii_digit() || b"+-.eE".contains(byte);
        let text = self.take(self.rest.bytes().take_while(is_part).count())?;
        is_number(text).then_some(text)
    }

    fn literal(&mut self) -> Option<&'a str> {
        let literal = ["true", "false", "null"].into_iter().find(|literal| self.rest.starts_with(literal))?;
        self.take(literal.len())
    }

    fn skip_blanks(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r']);
    }

    fn eat(&mut self, byte: u8) -> bool {
        let found = self.rest.bytes().next() == Some(byte);
        if found {
            self.rest = &self.rest[1..];
        }
        found
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.eat(byte).then_some(())
    }

    fn take(&mut self, length: usize) -> Option<&'a str> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(taken)
    }
}

/// An integer part without leading zeros, then perhaps a fraction, then perhaps an exponent.
fn is_number(text: &str) -> bool {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.strip_prefix(['+', '-']).unwrap_or(exponent)),
        None => (text, "0"),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, "0"));
    let whole = whole.strip_prefix('-').unwrap_or(whole);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits(whole) && digits(fraction) && digits(exponent) && (whole == "0" || !whole.starts_with('0'))
}

fn write_string(out: &mut Vec<u8>, text: &str) -> Option<()> {
    serde_json::to_writer(out, text).ok()
}

/// Bounds the work: each level is copied once more for each level above it.
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
    fn what_is_no_json_has_no_canonical_form() {
        for text in [
            r#"{"a":1,}"#,
            "[1,]",
            "[,1]",
            "[1,,2]",
            "{,}",
            "[01]",
            "[-01]",
            "[+1]",
            "[.5]",
            "[5.]",
            "[1e]",
            "[1e+]",
            "[-]",
            "[1.2.3]",
            "[1e5e5]",
            "[NaN]",
            "[Infinity]",
            "[0x10]",
            "[truex]",
            "[True]",
            "{'a':1}",
            "{a:1}",
            r#"{"a" 1}"#,
            r#"{"a":1 "b":2}"#,
            "// c\n1",
            "/* c */ 1",
            "[\"a\tb\"]",
            "[\"a\nb\"]",
            r#"["\ud800"]"#,
            r#"["\udc00\ud800"]"#,
            r#"["\x41"]"#,
            r#"["\u12g4"]"#,
            r#"["a]"#,
            r#"["a\"]"#,
            "\u{feff}1",
            "\u{a0}1",
            "1 2",
            "1\0",
            "[1",
            "{\"a\":1",
            "{\"a\"}",
            r#"{"a":1,"\u0061":2}"#,
            r#"{"a":{"b":1,"b":1}}"#,
        ] {
            assert_eq!(canonical(text, &[]), None, "{text}");
            assert_eq!(canonical(text, &["/a"]), None, "{text}");
        }
        assert_eq!(canonicalize(b"[\"\xff\"]", &[]), None);
        assert_eq!(canonicalize(b"[\"\xed\xa0\x80\"]", &[]), None);
    }

    #[test]
    fn numbers_are_kept_as_they_are_written() {
        for text in ["0", "-0", "1.0", "1e5", "1E+5", "0.0e-0", "-12.5", "1e999", "123456789012345678901234"]
        {
            assert_eq!(canonical(text, &[]).as_deref(), Some(text));
        }
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
