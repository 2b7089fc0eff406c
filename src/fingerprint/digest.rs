//! Digests of fields with their lengths.

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::canonical_json;

#[derive(Clone)]
pub(super) struct Secret {
    pub(super) id: u32,
    pub(super) key: Vec<u8>,
}

/// Digests fields with their lengths, without a copy of the body. Two different sequences of fields
/// are never digested as the same bytes.
pub(super) enum Input {
    Plain(Sha256),
    Keyed(Hmac<Sha256>),
}

impl Input {
    #[expect(clippy::expect_used, reason = "RFC 2104 defines HMAC for keys of any length")]
    pub(super) fn new(secret: Option<&Secret>) -> Self {
        match secret {
            None => Self::Plain(Sha256::new()),
            Some(secret) => {
                Self::Keyed(Hmac::new_from_slice(&secret.key).expect("an HMAC takes keys of any length"))
            }
        }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        match self {
            Self::Plain(digest) => digest.update(bytes),
            Self::Keyed(mac) => mac.update(bytes),
        }
    }

    pub(super) fn length(&mut self, length: usize) {
        self.bytes(&(length as u64).to_be_bytes());
    }

    pub(super) fn field(&mut self, bytes: &[u8]) {
        self.length(bytes.len());
        self.bytes(bytes);
    }

    pub(super) fn digest(self) -> [u8; DIGEST_LENGTH] {
        match self {
            Self::Plain(digest) => digest.finalize().into(),
            Self::Keyed(mac) => mac.finalize().into_bytes().into(),
        }
    }
}

/// A digest of the canonical JSON of a value; `None` if it has none.
pub(crate) fn canonical_digest(value: &(impl Serialize + ?Sized)) -> Option<Bytes> {
    let json = serde_json::to_vec(value).ok()?;
    let canonical = canonical_json::canonicalize(&json, &[])?;
    Some(Bytes::copy_from_slice(&Sha256::digest(canonical)))
}

pub(super) const DIGEST_LENGTH: usize = 32;
