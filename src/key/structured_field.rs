//! The part of [RFC 9651] that the key header needs: an Item that is a String, with parameters.
//!
//! [RFC 9651]: https://www.rfc-editor.org/rfc/rfc9651#name-parsing-an-item

/// Decodes an Item that is a String and drops its parameters. `None` if the value is malformed or
/// anything else.
pub(crate) fn string_item(value: &[u8]) -> Option<String> {
    let mut input = Input(value);
    let decoded = input.string()?;
    input.parameters()?;
    input.skip_spaces();
    input.0.is_empty().then_some(decoded)
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn peek(&self) -> Option<u8> {
        self.0.first().copied()
    }

    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn eat(&mut self, expected: u8) -> bool {
        let found = self.peek() == Some(expected);
        if found {
            self.next();
        }
        found
    }

    fn take_while(&mut self, accept: impl Fn(u8) -> bool) -> &'a [u8] {
        let length = self.0.iter().take_while(|byte| accept(**byte)).count();
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    fn skip_spaces(&mut self) {
        self.take_while(|byte| byte == b' ');
    }

    fn string(&mut self) -> Option<String> {
        if !self.eat(b'"') {
            return None;
        }
        let mut decoded = String::new();
        loop {
            match self.next()? {
                b'"' => return Some(decoded),
                b'\\' => decoded.push(char::from(self.next().filter(|byte| matches!(byte, b'"' | b'\\'))?)),
                byte @ 0x20..=0x7e => decoded.push(char::from(byte)),
                _ => return None,
            }
        }
    }

    fn parameters(&mut self) -> Option<()> {
        while self.eat(b';') {
            self.skip_spaces();
            self.parameter_key()?;
            if self.eat(b'=') {
                self.bare_item()?;
            }
        }
        Some(())
    }

    fn parameter_key(&mut self) -> Option<()> {
        self.peek().filter(|byte| byte.is_ascii_lowercase() || *byte == b'*')?;
        self.take_while(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-.*".contains(&byte));
        Some(())
    }

    fn bare_item(&mut self) -> Option<()> {
        match self.peek()? {
            b'"' => self.string().map(drop),
            b'-' | b'0'..=b'9' => self.number().map(drop),
            b'@' => self.date(),
            b'?' => self.boolean(),
            b':' => self.byte_sequence(),
            b'%' => self.display_string(),
            first if first.is_ascii_alphabetic() || first == b'*' => {
                self.take_while(|byte| is_tchar(byte) || byte == b':' || byte == b'/');
                Some(())
            }
            _ => None,
        }
    }

    /// Reads at most 15 digits, or 1 to 12 before the point and 1 to 3 after it.
    fn number(&mut self) -> Option<Number> {
        self.eat(b'-');
        let whole = self.take_while(|byte| byte.is_ascii_digit()).len();
        if !self.eat(b'.') {
            return (1..=15).contains(&whole).then_some(Number::Integer);
        }
        let fraction = self.take_while(|byte| byte.is_ascii_digit()).len();
        ((1..=12).contains(&whole) && (1..=3).contains(&fraction)).then_some(Number::Decimal)
    }

    fn date(&mut self) -> Option<()> {
        self.next();
        matches!(self.number()?, Number::Integer).then_some(())
    }

    fn boolean(&mut self) -> Option<()> {
        self.next();
        matches!(self.next()?, b'0' | b'1').then_some(())
    }

    /// Accepts missing padding, as RFC 9651 advises parsers to do.
    fn byte_sequence(&mut self) -> Option<()> {
        self.next();
        let digits =
            self.take_while(|byte| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/').len();
        let padding = self.take_while(|byte| byte == b'=').len();
        let complete = match digits % 4 {
            0 => padding == 0,
            2 => padding <= 2,
            3 => padding <= 1,
            _ => false,
        };
        (self.eat(b':') && complete).then_some(())
    }

    fn display_string(&mut self) -> Option<()> {
        self.next();
        if !self.eat(b'"') {
            return None;
        }
        let mut decoded = Vec::new();
        loop {
            match self.next()? {
                b'"' => return std::str::from_utf8(&decoded).is_ok().then_some(()),
                b'%' => decoded.push(self.hex_digit()? * 16 + self.hex_digit()?),
                byte @ 0x20..=0x7e => decoded.push(byte),
                _ => return None,
            }
        }
    }

    fn hex_digit(&mut self) -> Option<u8> {
        match self.next()? {
            digit @ b'0'..=b'9' => Some(digit - b'0'),
            digit @ b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        }
    }
}

enum Number {
    Integer,
    Decimal,
}

fn is_tchar(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn oracle(value: &[u8]) -> Option<String> {
        let item: sfv::Item = sfv::Parser::new(value).parse().ok()?;
        item.bare_item.as_string().map(|string| string.as_str().to_owned())
    }

    proptest! {
        #[test]
        fn agrees_with_the_reference_parser(value in r#""([ -~]|\\["\\]){0,6}"(;[ ]?[a-z*][a-z0-9_.*-]{0,2}(=(-?[0-9]{0,16}(\.[0-9]{0,4})?|"[a-z]{0,3}"|\?[0-2]|:[A-Za-z0-9+/]{0,5}={0,2}:|@-?[0-9.]{1,4}|%"[a-z%0-9]{0,6}"|[A-Za-z*][!-~]{0,4}))?){0,2} {0,2}"#) {
            prop_assert_eq!(string_item(value.as_bytes()), oracle(value.as_bytes()));
        }

        #[test]
        fn agrees_on_arbitrary_bytes(tail in proptest::collection::vec(any::<u8>(), 0..12)) {
            let value = [b"\"".as_slice(), &tail].concat();
            prop_assert_eq!(string_item(&value), oracle(&value));
        }
    }
}
