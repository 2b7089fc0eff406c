//! The parts in which two requests differ, as clients and logs read them.

use std::fmt;

use http::{HeaderName, HeaderValue, header, request::Parts};

/// A part of a request that a fingerprint covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Method,
    Path,
    Query,
    Header(HeaderName),
    ContentType,
    Body,
    /// The result of a function of the application.
    Content,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Method => f.write_str("method"),
            Self::Path => f.write_str("path"),
            Self::Query => f.write_str("query"),
            Self::Header(name) => write!(f, "header {name}"),
            Self::ContentType => f.write_str("content type"),
            Self::Body => f.write_str("body"),
            Self::Content => f.write_str("content"),
        }
    }
}

/// The parts in which a request differs from that of a record, with names and without values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    parts: Vec<Part>,
    /// `false`: the request differs in one of these parts at least.
    in_all: bool,
    hint: Option<&'static str>,
}

impl Difference {
    /// It differs in all these parts.
    pub(super) fn in_all(parts: Vec<Part>, request: &Parts) -> Self {
        Self { hint: hint(&parts, request), parts, in_all: true }
    }

    /// It differs in one of these parts at least.
    pub(super) fn in_one_of(parts: Vec<Part>, request: &Parts) -> Self {
        Self { in_all: false, ..Self::in_all(parts, request) }
    }

    /// A sentence for the author of a client that has sent a body with other bytes, if it may have
    /// meant the same.
    pub(crate) fn hint(&self) -> &'static str {
        self.hint.unwrap_or_default()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.parts.len().saturating_sub(1);
        for (at, part) in self.parts.iter().enumerate() {
            let before = match at {
                0 => "",
                _ if at < last => ", ",
                _ if self.in_all => " and ",
                _ => " or ",
            };
            write!(f, "{before}{part}")?;
        }
        Ok(())
    }
}

fn hint(parts: &[Part], request: &Parts) -> Option<&'static str> {
    let is_multipart = |value: &HeaderValue| {
        value.as_bytes().get(..10).is_some_and(|start| start.eq_ignore_ascii_case(b"multipart/"))
    };
    if !parts.iter().any(|part| matches!(part, Part::ContentType | Part::Body)) {
        None
    } else if request.headers.get(header::CONTENT_TYPE).is_some_and(is_multipart) {
        Some(" A retry must send the same bytes: a multipart form that is made again has another boundary.")
    } else if request.headers.contains_key(header::CONTENT_ENCODING) {
        Some(" A retry must send the same bytes: a body that is compressed again may have others.")
    } else {
        None
    }
}
