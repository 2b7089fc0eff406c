//! The outer form of stored bytes: a version, a checksum and length-prefixed fields.

use bytes::{Buf, BufMut, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue};
use sha2::{Digest, Sha256};

/// Stored bytes that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsealed {
    /// Their version is not known here.
    Version(u8),
    /// They were cut or changed.
    Damaged,
}

/// Puts one version byte and eight bytes of checksum before the payload.
pub(super) fn seal(version: u8, payload: &[u8]) -> Bytes {
    let mut encoded = Vec::with_capacity(1 + CHECKSUM_LENGTH + payload.len());
    encoded.put_u8(version);
    encoded.put_slice(&checksum(payload));
    encoded.put_slice(payload);
    encoded.into()
}

/// Returns the payload of what was sealed with this version.
pub(super) fn unseal(version: u8, encoded: &Bytes) -> Result<Bytes, Unsealed> {
    let mut input = encoded.clone();
    let found = input.try_get_u8().map_err(|_| Unsealed::Damaged)?;
    // Before the checksum, which another version may compute in another way.
    if found != version {
        return Err(Unsealed::Version(found));
    }
    if input.len() < CHECKSUM_LENGTH || input.split_to(CHECKSUM_LENGTH) != checksum(&input)[..] {
        return Err(Unsealed::Damaged);
    }
    Ok(input)
}

fn checksum(payload: &[u8]) -> [u8; CHECKSUM_LENGTH] {
    let digest = Sha256::digest(payload);
    let mut checksum = [0; CHECKSUM_LENGTH];
    checksum.copy_from_slice(&digest[..CHECKSUM_LENGTH]);
    checksum
}

pub(super) fn put_headers(out: &mut Vec<u8>, headers: &HeaderMap) {
    put_length(out, headers.len());
    for (name, value) in headers {
        put_bytes(out, name.as_str().as_bytes());
        put_bytes(out, value.as_bytes());
    }
}

pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_length(out, bytes.len());
    out.put_slice(bytes);
}

fn put_length(out: &mut Vec<u8>, length: usize) {
    out.put_u64(length as u64);
}

pub(super) fn get_headers(input: &mut Bytes) -> Option<HeaderMap> {
    let count = input.try_get_u64().ok()?;
    let mut headers = HeaderMap::new();
    for _ in 0..count {
        let name = HeaderName::from_bytes(&get_bytes(input)?).ok()?;
        let value = HeaderValue::from_maybe_shared(get_bytes(input)?).ok()?;
        headers.try_append(name, value).ok()?;
    }
    Some(headers)
}

pub(super) fn get_bytes(input: &mut Bytes) -> Option<Bytes> {
    let length = usize::try_from(input.try_get_u64().ok()?).ok()?;
    (length <= input.len()).then(|| input.split_to(length))
}

const CHECKSUM_LENGTH: usize = 8;
