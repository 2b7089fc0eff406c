//! A statement and its values.

use std::{sync::Arc, time::Duration};

use uuid::Uuid;

/// A statement with its values `$1`, `$2` and so on.
pub(in crate::store) struct Call<'a> {
    pub(in crate::store) sql: Arc<str>,
    pub(in crate::store) values: Vec<Value<'a>>,
}

pub(in crate::store) enum Value<'a> {
    Null,
    Flag(bool),
    Text(&'a str),
    Bytes(&'a [u8]),
    Uuid(Uuid),
    Int(i64),
    /// A time span, which every database can add to its clock.
    Span(Duration),
    #[cfg(feature = "postgres")]
    Small(i16),
    #[cfg(feature = "postgres")]
    Texts(Vec<&'a str>),
    #[cfg(feature = "postgres")]
    Uuids(Vec<Uuid>),
    #[cfg(feature = "postgres")]
    Ints(Vec<i64>),
}

impl<'a> Call<'a> {
    pub(in crate::store) fn new(sql: impl Into<Arc<str>>) -> Self {
        Self { sql: sql.into(), values: Vec::new() }
    }

    pub(in crate::store) fn with(mut self, value: Value<'a>) -> Self {
        self.values.push(value);
        self
    }
}

impl<'a> Value<'a> {
    pub(in crate::store) fn text(text: Option<&'a str>) -> Self {
        text.map_or(Self::Null, Self::Text)
    }

    pub(in crate::store) fn bytes(bytes: Option<&'a [u8]>) -> Self {
        bytes.map_or(Self::Null, Self::Bytes)
    }
}
