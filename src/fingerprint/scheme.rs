//! Fingerprints as bytes: version, scheme, digest of the whole, and short digests of its parts.

use std::borrow::Cow;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, header, request::Parts};

use super::{
    Fingerprint, Fingerprinter, Payload, canonical_json,
    difference::{Difference, Part},
    digest::{DIGEST_LENGTH, Input},
};
use crate::head::lines_of;

/// A request beside the fingerprint of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    /// The same request. With its fingerprint in the scheme of the record.
    Same(Fingerprint),
    /// Another request.
    Different(Difference),
    /// The scheme of the record is not known here.
    Unknown,
}

/// Versions of the algorithm. The high bit is never set, see [`ARGUMENTS_VERSION`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// One digest of everything, with headers as HTTP/2 sends them.
    Whole = 1,
    /// With digests of the parts, and headers as HTTP/1.1 writes them.
    Parts = 2,
}

type SchemeId = [u8; SCHEME_LENGTH];
/// Digest of the options, id of the secret.
pub(super) type OptionsId = [u8; SCHEME_LENGTH - 1];

/// A covered part with its bytes.
type Covered<'a> = (Part, Cow<'a, [u8]>);

impl Fingerprinter {
    /// Computes the fingerprint of a request.
    pub(crate) fn fingerprint(&self, parts: &Parts, body: &Bytes) -> Fingerprint {
        self.in_version(Version::Parts, parts, body)
    }

    /// Compares a request with that of a record, in the scheme of the record.
    pub(crate) fn compare(&self, record: &Fingerprint, parts: &Parts, body: &Bytes) -> Comparison {
        // The own scheme first: it fits all records but those from before a change.
        for scheme in std::iter::once(self).chain(&self.previous) {
            for version in [Version::Parts, Version::Whole] {
                if record.0.starts_with(&scheme.id(version)) {
                    let fingerprint = scheme.in_version(version, parts, body);
                    return match fingerprint == *record {
                        true => Comparison::Same(fingerprint),
                        false => Comparison::Different(scheme.difference(version, record, parts)),
                    };
                }
            }
        }
        Comparison::Unknown
    }

    pub(super) fn in_version(&self, version: Version, parts: &Parts, body: &Bytes) -> Fingerprint {
        let id = self.id(version);
        let bytes = match version {
            Version::Whole => [&id[..], &self.whole_digest(parts, body)].concat(),
            Version::Parts => {
                let target = (self.target)(parts);
                let covered = self.parts_of(&target, parts);
                let mut input = Input::new(self.secret.as_ref());
                covered.iter().for_each(|(_, bytes)| input.field(bytes));
                self.payload.add_to(version, &mut input, parts, body);
                let digest = input.digest();
                let mut bytes = Vec::with_capacity(id.len() + digest.len() + covered.len() * PART_LENGTH);
                bytes.extend(id);
                bytes.extend(digest);
                bytes.extend(self.part_digests(&digest, &covered).flatten());
                bytes
            }
        };
        Fingerprint(bytes.into())
    }

    fn whole_digest(&self, parts: &Parts, body: &Bytes) -> [u8; DIGEST_LENGTH] {
        let mut input = Input::new(self.secret.as_ref());
        input.field(parts.method.as_str().as_bytes());
        input.field((self.target)(parts).as_bytes());
        for name in &self.headers {
            let lines: Vec<_> = parts.headers.get_all(name).iter().collect();
            // The count tells one empty line from no line.
            input.length(lines.len());
            lines.iter().for_each(|line| input.field(line.as_bytes()));
        }
        if self.payload.has_content_type() {
            let content_type = parts.headers.get(header::CONTENT_TYPE);
            input.field(content_type.map_or(&[], HeaderValue::as_bytes));
        }
        self.payload.add_to(Version::Whole, &mut input, parts, body);
        input.digest()
    }

    /// The covered parts but the payload.
    fn parts_of<'a>(&self, target: &'a str, parts: &'a Parts) -> Vec<Covered<'a>> {
        let (path, query) = target.split_at(target.find('?').unwrap_or(target.len()));
        let mut covered = vec![
            (Part::Method, parts.method.as_str().as_bytes().into()),
            (Part::Path, path.as_bytes().into()),
            (Part::Query, query.as_bytes().into()),
        ];
        let headers =
            self.headers.iter().map(|name| (Part::Header(name.clone()), counted_lines(parts, name).into()));
        covered.extend(headers);
        if self.payload.has_content_type() {
            covered.push((Part::ContentType, counted_lines(parts, &header::CONTENT_TYPE).into()));
        }
        covered
    }

    /// Two bytes for each part, salted with the digest of the whole: equal parts of two records are
    /// not seen to be equal, and a guess of a part can be told from most others, but not from all.
    /// The payload has none. So its guesses can only be tested as with the digest of the whole, by
    /// a person who knows all other parts.
    fn part_digests(&self, whole: &[u8], covered: &[Covered<'_>]) -> impl Iterator<Item = [u8; PART_LENGTH]> {
        let digest_of = move |(at, (_, bytes)): (usize, &Covered<'_>)| {
            let mut input = Input::new(self.secret.as_ref());
            input.field(whole);
            input.length(at);
            input.field(bytes);
            let digest = input.digest();
            [digest[0], digest[1]]
        };
        covered.iter().enumerate().map(digest_of)
    }

    /// The parts in which a request differs from that of a record in this scheme.
    fn difference(&self, version: Version, record: &Fingerprint, parts: &Parts) -> Difference {
        let target = (self.target)(parts);
        let covered = self.parts_of(&target, parts);
        let differing = match version {
            Version::Whole => None,
            Version::Parts => self.differing(&record.0[SCHEME_LENGTH..], &covered),
        };
        match differing {
            Some(differing) if !differing.is_empty() => Difference::in_all(differing, parts),
            // All others are equal.
            Some(_) if self.payload.part().is_some() => {
                Difference::in_all(self.payload.part().into_iter().collect(), parts)
            }
            Some(_) | None => {
                let all = covered.into_iter().map(|(part, _)| part).chain(self.payload.part());
                Difference::in_one_of(all.collect(), parts)
            }
        }
    }

    /// The parts whose digests differ from those of a record; `None` if the record is damaged.
    fn differing(&self, recorded: &[u8], covered: &[Covered<'_>]) -> Option<Vec<Part>> {
        let (whole, recorded) = recorded.split_at_checked(DIGEST_LENGTH)?;
        let own = self.part_digests(whole, covered);
        let differing = covered.iter().zip(own).zip(recorded.chunks(PART_LENGTH));
        let differing = differing.filter(|((_, own), recorded)| own != recorded);
        let is_whole = recorded.len() == covered.len() * PART_LENGTH;
        is_whole.then(|| differing.map(|((part, _), _)| part.0.clone()).collect())
    }

    /// Version of the algorithm, digest of the options, id of the secret.
    fn id(&self, version: Version) -> SchemeId {
        let mut id = [version as u8; SCHEME_LENGTH];
        id[1..].copy_from_slice(self.options.get_or_init(|| self.options_id()));
        id
    }

    fn options_id(&self) -> OptionsId {
        let mut options = Input::new(None);
        self.headers.iter().for_each(|name| options.field(name.as_str().as_bytes()));
        options.length(self.headers.len());
        options.field(if self.secret.is_some() { b"hmac" } else { b"hash" });
        self.payload.describe(&mut options);
        let mut id = OptionsId::default();
        // Four bytes tell the few schemes of one application apart.
        id[..4].copy_from_slice(&options.digest()[..4]);
        id[4..].copy_from_slice(&self.secret.as_ref().map_or(0, |secret| secret.id).to_be_bytes());
        id
    }
}

impl Payload {
    fn add_to(&self, version: Version, input: &mut Input, parts: &Parts, body: &Bytes) {
        match self {
            Self::None => {}
            Self::Custom(_, digest) => input.field(&digest(parts, body)),
            Self::Bytes => input.field(body),
            Self::CanonicalJson(excluded) => {
                let canonical = canonical_json::canonicalize(body, excluded);
                // A body that is no JSON can look like the canonical form of another one.
                if version == Version::Parts {
                    input.length(usize::from(canonical.is_some()));
                }
                // Compared byte by byte: parsers disagree about the meaning of what is no JSON.
                input.field(canonical.as_deref().unwrap_or(body));
            }
        }
    }

    fn has_content_type(&self) -> bool {
        matches!(self, Self::Bytes | Self::CanonicalJson(_))
    }

    fn part(&self) -> Option<Part> {
        match self {
            Self::None => None,
            Self::Custom(..) => Some(Part::Content),
            Self::Bytes | Self::CanonicalJson(_) => Some(Part::Body),
        }
    }

    fn describe(&self, options: &mut Input) {
        match self {
            Self::Bytes => options.field(b"bytes"),
            Self::None => options.field(b"none"),
            Self::Custom(version, _) => {
                options.field(b"custom");
                options.field(&version.to_be_bytes());
            }
            Self::CanonicalJson(excluded) => {
                options.field(b"json");
                excluded.iter().for_each(|pointer| options.field(pointer.as_str().as_bytes()));
            }
        }
    }
}

/// The lines with their lengths. Their number tells one empty line from no line.
fn counted_lines(parts: &Parts, name: &HeaderName) -> Vec<u8> {
    let lines = lines_of(parts, name);
    let mut counted = (lines.len() as u64).to_be_bytes().to_vec();
    for line in lines {
        counted.extend((line.len() as u64).to_be_bytes());
        counted.extend(line.as_bytes());
    }
    counted
}

pub(super) const ARGUMENTS_VERSION: u8 = 0x81;
pub(super) const SCHEME_LENGTH: usize = 9;
const PART_LENGTH: usize = 2;
