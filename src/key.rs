//! The idempotency key: how the header is read and which values it accepts.

mod structured_field;

use std::{fmt, sync::Arc};

use http::{HeaderMap, HeaderName};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// An idempotency key: chosen by the client, opaque, compared byte by byte.
///
/// It has 1 to 255 bytes of printable ASCII.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IdempotencyKey(Arc<str>);

impl IdempotencyKey {
    /// Makes a key from its decoded value.
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] if the value is empty, longer than 255 bytes or not printable ASCII.
    pub fn new(value: impl Into<String>) -> Result<Self, InvalidKey> {
        let value = value.into();
        if value.is_empty() {
            return Err(InvalidKey::Empty);
        }
        if value.len() > MAX_LENGTH {
            return Err(InvalidKey::TooLong { length: value.len(), maximum: MAX_LENGTH });
        }
        if !value.bytes().all(|byte| matches!(byte, 0x20..=0x7e)) {
            return Err(InvalidKey::Character);
        }
        Ok(Self(value.into()))
    }

    /// The key of a request whose client sent none.
    pub(crate) fn from_digest(digest: &[u8]) -> Self {
        let digest = Sha256::digest([b"derived key of ", digest].concat());
        Self(format!("{DERIVED}{}", hex(&digest)).into())
    }

    /// Returns `true` if the key was derived from the request. Such a key tells as much about the
    /// request as its fingerprint, and no client can send it.
    pub(crate) fn is_derived(&self) -> bool {
        let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let digest = self.0.strip_prefix(DERIVED);
        digest.is_some_and(|digest| digest.len() == 64 && digest.bytes().all(is_hex))
    }

    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The reason why a header value is not an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidKey {
    /// The request has more than one key header line.
    #[error("the key header was sent more than once; send exactly one")]
    Repeated,
    /// The value is empty after decoding, or has blanks only.
    #[error("the key is empty or blank")]
    Empty,
    /// The key is longer than the maximum.
    #[error("the key has {length} bytes; at most {maximum} are allowed")]
    TooLong {
        /// Length of the key in bytes.
        length: usize,
        /// Greatest length in bytes.
        maximum: usize,
    },
    /// The key is shorter than the minimum.
    #[error("the key has {length} bytes; at least {minimum} are required")]
    TooShort {
        /// Length of the key in bytes.
        length: usize,
        /// Least length in bytes.
        minimum: usize,
    },
    /// The value contains a byte that a key cannot have.
    #[error(
        "the key contains a character that is not allowed; use visible ASCII without quotation mark, \
         comma, semicolon and backslash, or a quoted string"
    )]
    Character,
    /// The value begins with a quotation mark and is not a String of [RFC 9651][strings].
    ///
    /// [strings]: https://www.rfc-editor.org/rfc/rfc9651#name-strings
    #[error("the key begins with a quotation mark but is not a structured field String (RFC 9651)")]
    Malformed,
    /// The value is not quoted, and only structured fields are accepted.
    #[error("the key must be a structured field String (RFC 9651): put it in quotation marks")]
    Unquoted,
    /// The value is not a UUID, and only UUIDs are accepted.
    #[error("the key must be a UUID")]
    NotUuid,
    /// The value has the form of the keys that this crate derives from requests without one.
    #[error("the key has the form of keys that the server makes itself; make another one")]
    Reserved,
}

/// Decides which keys are accepted. Default: 1 to 255 bytes after decoding, quoted or not.
///
/// A value that begins with `"` is read as a String of a structured field ([RFC 9651]), as the
/// [IETF draft] writes it: escapes are decoded, parameters must be well formed and are ignored. Any
/// other value is a bare key of visible ASCII without `"`, `,`, `;` and `\`. So `"k"` and `k` are
/// the same key. Blanks alone are no key.
///
/// A malformed key is refused with 400 `key-invalid`.
///
/// ```
/// # use tower_idempotency::{IdempotencyLayer, KeySyntax, MemoryStore};
/// let layer = IdempotencyLayer::new(MemoryStore::new())
///     .with_key_syntax(KeySyntax::default().with_length(16, 64));
/// ```
///
/// [RFC 9651]: https://www.rfc-editor.org/rfc/rfc9651#name-strings
/// [IETF draft]: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
#[derive(Clone, Debug)]
pub struct KeySyntax {
    minimum: usize,
    maximum: usize,
    form: Form,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Any,
    Strict,
    Uuid,
}

impl Default for KeySyntax {
    fn default() -> Self {
        Self { minimum: 1, maximum: MAX_LENGTH, form: Form::Any }
    }
}

impl KeySyntax {
    /// Accepts quoted strings only, as the IETF Idempotency-Key draft writes the header.
    ///
    /// ```
    /// # use tower_idempotency::KeySyntax;
    /// let syntax = KeySyntax::structured_field();
    /// ```
    #[must_use]
    pub fn structured_field() -> Self {
        Self { form: Form::Strict, ..Self::default() }
    }

    /// Accepts UUIDs only, with hyphens, bare or quoted, in upper or lower case ([RFC 9562]).
    ///
    /// The case is part of the key: the same UUID in another case is another key.
    ///
    /// [RFC 9562]: https://www.rfc-editor.org/rfc/rfc9562
    ///
    /// ```
    /// # use tower_idempotency::KeySyntax;
    /// let syntax = KeySyntax::uuid();
    /// ```
    #[must_use]
    pub fn uuid() -> Self {
        Self { form: Form::Uuid, ..Self::default() }
    }

    /// Sets the least and the greatest length, in bytes after decoding. Defaults: 1 and 255.
    ///
    /// A least length refuses keys that clients are likely to repeat by accident, such as `1`.
    ///
    /// # Panics
    ///
    /// Panics if `minimum` is zero or greater than `maximum`, or if `maximum` is greater than 255.
    ///
    /// ```
    /// # use tower_idempotency::KeySyntax;
    /// let syntax = KeySyntax::default().with_length(16, 64);
    /// ```
    #[must_use]
    #[track_caller]
    pub fn with_length(mut self, minimum: usize, maximum: usize) -> Self {
        assert!(
            1 <= minimum && minimum <= maximum && maximum <= MAX_LENGTH,
            "key length {minimum} to {maximum} is not possible: choose a range within 1 to {MAX_LENGTH}"
        );
        (self.minimum, self.maximum) = (minimum, maximum);
        self
    }

    /// Reads the key from the request headers; `None` if there is no such header.
    pub(crate) fn read(
        &self,
        headers: &HeaderMap,
        name: &HeaderName,
    ) -> Result<Option<IdempotencyKey>, InvalidKey> {
        let mut lines = headers.get_all(name).iter();
        let Some(value) = lines.next() else { return Ok(None) };
        // Refused even if the lines are equal: a proxy that joins or drops lines would change the key.
        if lines.next().is_some() {
            return Err(InvalidKey::Repeated);
        }
        // HTTP/1.1 has removed the space around the value already.
        self.parse(value.as_bytes().trim_ascii()).map(Some)
    }

    fn parse(&self, value: &[u8]) -> Result<IdempotencyKey, InvalidKey> {
        let decoded = match value.first() {
            None => return Err(InvalidKey::Empty),
            Some(b'"') => structured_field::string_item(value).ok_or(InvalidKey::Malformed)?,
            Some(_) if self.form == Form::Strict => return Err(InvalidKey::Unquoted),
            Some(_) => bare(value)?,
        };
        if self.form == Form::Uuid && !is_hyphenated_uuid(&decoded) {
            return Err(InvalidKey::NotUuid);
        }
        if decoded.bytes().all(|byte| byte == b' ') {
            return Err(InvalidKey::Empty);
        }
        // After decoding, so that quotation marks and escapes do not count.
        self.check_length(decoded.len())?;
        let key = IdempotencyKey::new(decoded)?;
        if key.is_derived() { Err(InvalidKey::Reserved) } else { Ok(key) }
    }

    fn check_length(&self, length: usize) -> Result<(), InvalidKey> {
        if length < self.minimum {
            return Err(InvalidKey::TooShort { length, minimum: self.minimum });
        }
        if length > self.maximum {
            return Err(InvalidKey::TooLong { length, maximum: self.maximum });
        }
        Ok(())
    }
}

fn bare(value: &[u8]) -> Result<String, InvalidKey> {
    let allowed = |byte: &u8| matches!(byte, 0x21..=0x7e) && !matches!(byte, b'"' | b',' | b';' | b'\\');
    if !value.iter().all(allowed) {
        return Err(if value.iter().all(u8::is_ascii_whitespace) {
            InvalidKey::Empty
        } else {
            InvalidKey::Character
        });
    }
    Ok(value.iter().copied().map(char::from).collect())
}

fn is_hyphenated_uuid(value: &str) -> bool {
    // The parser also accepts braces, URNs and digits without hyphens; the length rules them out.
    value.len() == uuid::fmt::Hyphenated::LENGTH && Uuid::try_parse(value).is_ok()
}

/// Text for a name that is made of a digest.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from(b"0123456789abcdef"[usize::from(value)]);
    let mut text = String::with_capacity(2 * bytes.len());
    bytes.iter().for_each(|byte| text.extend([digit(byte >> 4), digit(byte & 15)]));
    text
}

/// The header that keys come in, unless a layer has another one.
pub(crate) const KEY_HEADER: HeaderName = HeaderName::from_static("idempotency-key");

const MAX_LENGTH: usize = 255;
const DERIVED: &str = "derived:";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: &[u8]) -> Result<String, InvalidKey> {
        KeySyntax::default().parse(value).map(|key| key.as_str().to_owned())
    }

    #[test]
    fn quoted_and_bare_are_the_same_key() {
        assert_eq!(parse(b"abc-123").unwrap(), "abc-123");
        assert_eq!(parse(b"\"abc-123\"").unwrap(), "abc-123");
        assert_eq!(parse(br#""a\"b\\c, d;e ";v=1;w"#).unwrap(), r#"a"b\c, d;e "#);
    }

    #[test]
    fn case_and_inner_trailing_space_matter() {
        assert_ne!(parse(b"Abc").unwrap(), parse(b"abc").unwrap());
        assert_ne!(parse(b"\"abc \"").unwrap(), parse(b"\"abc\"").unwrap());
    }

    #[test]
    fn malformed_keys_are_refused() {
        let refused: [&[u8]; 16] = [
            b"",
            b" ",
            b"\t",
            b"\"\"",
            b"\"abc",
            b"a b",
            b"a,b",
            b"a;b",
            b"a\\b",
            b"a\"b",
            b"\"a\" b",
            b"\"a\", \"b\"",
            b"\"a\";",
            b"\xff\xfe",
            b"\"\xc3\xa4\"",
            b"a\x7f",
        ];
        for value in refused {
            assert!(parse(value).is_err(), "{value:?} was accepted");
        }
    }

    #[test]
    fn blank_keys_are_refused_quoted_or_not() {
        let syntaxes = [KeySyntax::default(), KeySyntax::structured_field()];
        for value in ["\"\"", "\" \"", "\"   \"", "\"  \";v=1", "\"  \" "] {
            for syntax in &syntaxes {
                assert_eq!(syntax.parse(value.as_bytes()), Err(InvalidKey::Empty), "{value}");
            }
        }
        for value in [&b""[..], b" ", b"\t "] {
            assert_eq!(parse(value), Err(InvalidKey::Empty));
        }
        assert_eq!(parse(b"\" k \"").unwrap(), " k ");
    }

    #[test]
    fn derived_keys_cannot_be_sent() {
        let derived = IdempotencyKey::from_digest(b"digest");
        assert!(derived.is_derived());
        for value in [derived.as_str().to_owned(), format!("\"{derived}\"")] {
            assert_eq!(parse(value.as_bytes()), Err(InvalidKey::Reserved));
        }
        for value in ["derived:", "derived:1", &derived.as_str().to_uppercase(), &format!("{derived}0")] {
            assert!(parse(value.as_bytes()).is_ok(), "{value}");
        }
    }

    #[test]
    fn space_around_the_value_does_not_count() {
        let name = HeaderName::from_static("idempotency-key");
        for value in ["k", "k ", " k", "\"k\"\t"] {
            let headers = HeaderMap::from_iter([(name.clone(), value.parse().unwrap())]);
            assert_eq!(KeySyntax::default().read(&headers, &name).unwrap().unwrap().as_str(), "k");
        }
    }

    #[test]
    fn length_is_counted_after_decoding() {
        assert!(parse("k".repeat(255).as_bytes()).is_ok());
        assert_eq!(parse("k".repeat(256).as_bytes()), Err(InvalidKey::TooLong { length: 256, maximum: 255 }));
        assert!(parse(format!("\"{}\"", r"\\".repeat(255)).as_bytes()).is_ok());
        let syntax = KeySyntax::default().with_length(8, 16);
        assert_eq!(syntax.parse(b"short"), Err(InvalidKey::TooShort { length: 5, minimum: 8 }));
        assert!(syntax.parse(b"12345678").is_ok());
    }

    #[test]
    fn strict_and_uuid_forms() {
        assert_eq!(KeySyntax::structured_field().parse(b"abc"), Err(InvalidKey::Unquoted));
        assert!(KeySyntax::structured_field().parse(b"\"abc\"").is_ok());
        let uuid = b"8e03978e-40d5-43dd-bc93-6894a57f9324";
        assert!(KeySyntax::uuid().parse(uuid).is_ok());
        assert_eq!(KeySyntax::uuid().parse(b"8e03978e40d543ddbc936894a57f9324"), Err(InvalidKey::NotUuid));
    }
}
