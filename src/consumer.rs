//! The API consumer that a key belongs to.

mod credentials;
mod extractor;
mod unidentified;

use std::{fmt, sync::Arc};

pub(crate) use self::credentials::is_credential;
pub use self::extractor::ConsumerExtractor;

/// The API consumer that a key belongs to: 1 to 255 bytes of UTF-8, compared byte by byte.
///
/// A consumer is a customer, an account or a tenant of your API. Two consumers can use the same key
/// and never see each other's responses. The authentication layer puts the consumer into the
/// request's extensions:
///
/// ```
/// # use tower_idempotency::Consumer;
/// # let mut request = http::Request::new(());
/// request.extensions_mut().insert(Consumer::new("acme")?);
/// # Ok::<(), tower_idempotency::errors::InvalidConsumer>(())
/// ```
///
/// The scopes that this crate makes begin with U+001F, which no other name can contain: no
/// user can have their names. Logs show them in brackets, as `[anonymous]`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Consumer(Arc<str>);

impl Consumer {
    /// Makes a consumer with this name.
    ///
    /// # Errors
    ///
    /// [`InvalidConsumer`] if the name is empty, is longer than 255 bytes or contains a NUL or
    /// U+001F.
    pub fn new(name: impl AsRef<str>) -> Result<Self, InvalidConsumer> {
        let name = name.as_ref();
        match name.contains(RESERVED) {
            true => Err(InvalidConsumer { length: name.len() }),
            false => Self::from_stored(name),
        }
    }

    /// Reads a name as a store has kept it, which is that of [`as_str`](Self::as_str). The name of
    /// a scope that this crate makes is read too. For stores and operators; use [`new`](Self::new)
    /// for names that come from elsewhere.
    ///
    /// # Errors
    ///
    /// [`InvalidConsumer`] if the name is empty, is longer than 255 bytes or contains a NUL.
    pub fn from_stored(name: impl AsRef<str>) -> Result<Self, InvalidConsumer> {
        let name = name.as_ref();
        if name.is_empty() || name.len() > 255 || name.contains('\0') {
            return Err(InvalidConsumer { length: name.len() });
        }
        Ok(Self(name.into()))
    }

    /// The scope of all requests without a credential, unless the
    /// [extractor](ConsumerExtractor) finds another consumer.
    ///
    /// ```
    /// # use tower_idempotency::Consumer;
    /// assert_eq!(Consumer::anonymous().to_string(), "[anonymous]");
    /// assert_ne!(Consumer::anonymous(), Consumer::new("anonymous")?);
    /// # Ok::<(), tower_idempotency::errors::InvalidConsumer>(())
    /// ```
    #[must_use]
    pub fn anonymous() -> Self {
        Self::reserved("anonymous")
    }

    fn reserved(name: &str) -> Self {
        Self(format!("{RESERVED}{name}").into())
    }

    /// The name, as stores keep it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.strip_prefix(RESERVED) {
            Some(scope) => write!(f, "[{scope}]"),
            None => f.write_str(&self.0),
        }
    }
}

/// The name is not one that a consumer can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a consumer is 1 to 255 bytes of UTF-8 without NUL and U+001F; this name has {length} bytes, or one of \
     the two characters"
)]
pub struct InvalidConsumer {
    length: usize,
}

/// Only scopes that this crate makes contain it.
const RESERVED: char = '\u{1f}';

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_when_made() {
        assert!(Consumer::new("a").is_ok() && Consumer::new("ä".repeat(127)).is_ok());
        for name in ["", "a\0", "\u{1f}anonymous", "a\u{1f}", &"a".repeat(256)] {
            assert!(Consumer::new(name).is_err(), "{name:?}");
        }
    }
}
