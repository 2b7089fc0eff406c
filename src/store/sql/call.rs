//! Statements with named values, and how a dialect renders them.

use std::{borrow::Cow, fmt::Write, sync::Arc, time::Duration};

use uuid::Uuid;

use super::rules::RULES;
use crate::{
    consumer::Consumer,
    key::IdempotencyKey,
    stored::record::{Attempt, Claim, RecordId},
};

/// The fragments in which one database differs from the others.
///
/// A template has fragments in braces, such as `{now}`, and named values, such as `:consumer`.
#[derive(Clone, Debug)]
pub(in crate::store) struct Dialect {
    placeholder: Option<char>,
    fragments: Vec<(&'static str, Cow<'static, str>)>,
    /// The columns from which values are read.
    columns: &'static [(&'static str, &'static str)],
}

impl Dialect {
    /// Makes a dialect. `placeholder` stands before the number of a value. Without one, each value
    /// is a question mark. `table` returns the full name of a table.
    pub(in crate::store) fn new(
        placeholder: Option<char>,
        table: impl Fn(&str) -> String,
        fragments: &[(&'static str, &'static str)],
    ) -> Self {
        let tables = TABLES.map(|name| (name, Cow::from(table(name))));
        let own = fragments.iter().map(|(name, value)| (*name, Cow::from(*value)));
        Self { placeholder, fragments: own.chain(tables).collect(), columns: &[] }
    }

    /// Replaces the fragment of this name.
    pub(in crate::store) fn with(&self, name: &'static str, value: &'static str) -> Self {
        let mut dialect = self.clone();
        // In front, because the first fragment of a name is used.
        dialect.fragments.insert(0, (name, value.into()));
        dialect
    }

    /// Makes the dialect of statements over many rows, which are called `excluded` as in an `ON
    /// CONFLICT`. They are the records that claims propose, or have the values of other calls. The
    /// values that the rules name are read from them.
    pub(in crate::store) fn of_rows(&self) -> Self {
        let rows = self
            .with("lease_until", "excluded.lease_until")
            .with("expiry_if_new", "excluded.expires_at")
            .with("stored", "CASE WHEN NOT {large} THEN {r}.response END AS response")
            .with("large", "(COALESCE(octet_length({r}.response), 0) > 16384)");
        Self { columns: COLUMNS, ..rows }
    }

    /// Renders a statement.
    pub(in crate::store) fn statement(&self, template: &str) -> Statement {
        let mut sql = String::with_capacity(4 * template.len());
        self.fill(template, true, &mut sql);
        Statement::over_rows(&sql, self.placeholder, self.columns)
    }

    /// Renders a statement that ends by returning `columns`. They have no alias, because SQLite
    /// knows none there.
    pub(in crate::store) fn returning(&self, template: &str, columns: &str) -> Statement {
        let mut sql = String::new();
        self.fill(template, true, &mut sql);
        sql.push_str(" RETURNING ");
        self.fill(columns, false, &mut sql);
        Statement::over_rows(&sql, self.placeholder, self.columns)
    }

    /// Fills in the fragments, and the fragments inside of them. Names in quotes stay as they are:
    /// a schema may have any name.
    fn fill(&self, template: &str, qualified: bool, sql: &mut String) {
        for (text, quoted) in by_quotes(template) {
            match quoted {
                true => sql.push_str(text),
                false => self.fill_in(text, qualified, sql),
            }
        }
    }

    fn fill_in(&self, template: &str, qualified: bool, sql: &mut String) {
        let mut rest = template;
        while let Some((before, (name, after))) =
            rest.split_once('{').and_then(|(before, after)| Some((before, after.split_once('}')?)))
        {
            sql.push_str(before);
            rest = after;
            match self.fragment(name) {
                Some(fragment) => self.fill(fragment, qualified, sql),
                None if qualified => sql.push_str(name),
                None => rest = rest.strip_prefix('.').unwrap_or(rest),
            }
        }
        sql.push_str(rest);
    }

    /// Returns `None` for an alias.
    fn fragment(&self, name: &str) -> Option<&str> {
        let own = self.fragments.iter().map(|(name, value)| (*name, value.as_ref()));
        let found = own.chain(RULES.iter().copied()).find(|(known, _)| *known == name);
        assert!(found.is_some() || ALIASES.contains(&name), "{{{name}}} is a fragment or an alias");
        found.map(|(_, value)| value)
    }
}

/// A statement as its database reads it.
#[derive(Clone, Debug)]
pub(in crate::store) struct Statement {
    pub(in crate::store) text: Arc<str>,
    /// The names of its values, in the order in which they are sent.
    names: Vec<String>,
}

impl Statement {
    #[cfg(feature = "postgres")]
    pub(in crate::store) fn new(template: &str, placeholder: Option<char>) -> Self {
        Self::over_rows(template, placeholder, &[])
    }

    /// Replaces the names by columns or placeholders. A value that occurs twice is sent once if it
    /// has a number. Two colons are a cast.
    fn over_rows(template: &str, placeholder: Option<char>, columns: &[(&str, &str)]) -> Self {
        let (mut text, mut names) = (String::new(), Vec::new());
        for (part, quoted) in by_quotes(template) {
            match quoted {
                true => text.push_str(part),
                false => number(part, placeholder, columns, &mut text, &mut names),
            }
        }
        Self { text: text.into(), names }
    }
}

/// Replaces the names in a part of a statement.
fn number(
    part: &str,
    placeholder: Option<char>,
    columns: &[(&str, &str)],
    text: &mut String,
    names: &mut Vec<String>,
) {
    let mut parts = part.split(':');
    text.push_str(parts.next().unwrap_or_default());
    while let Some(part) = parts.next() {
        if part.is_empty() {
            text.push_str("::");
            text.push_str(parts.next().unwrap_or_default());
            continue;
        }
        let end = part.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(part.len());
        let (name, rest) = part.split_at(end);
        if let Some((_, column)) = columns.iter().find(|(value, _)| *value == name) {
            text.push_str(column);
            text.push_str(rest);
            continue;
        }
        let known = names.iter().position(|known| known == name && placeholder.is_some());
        let number = known.unwrap_or(names.len()) + 1;
        if known.is_none() {
            names.push(name.to_owned());
        }
        match placeholder {
            // Writing to a string does not fail.
            Some(mark) => drop(write!(text, "{mark}{number}{rest}")),
            None => drop(write!(text, "?{rest}")),
        }
    }
}

/// Splits SQL at its quoted names, which keep their quotes. `true` for a quoted name.
fn by_quotes(sql: &str) -> impl Iterator<Item = (&str, bool)> {
    let mut rest = sql;
    std::iter::from_fn(move || {
        let quoted = rest.starts_with('"');
        let end = match quoted {
            true => rest[1..].find('"').map(|end| end + 2),
            false => rest.find('"'),
        };
        let (part, after) = rest.split_at(end.unwrap_or(rest.len()));
        rest = after;
        (!part.is_empty()).then_some((part, quoted))
    })
}

/// Declares a struct of statements: for each, a field and its text.
macro_rules! statements {
    ($(#[$doc:meta])* $vis:vis struct $name:ident by $dialect:ident {
        $($(#[$note:meta])* $field:ident: $statement:expr,)*
    }) => {
        $(#[$doc])*
        #[derive(Debug)]
        $vis struct $name {
            $($(#[$note])* $vis $field: $crate::store::sql::call::Statement,)*
        }

        impl $name {
            $vis fn new($dialect: &$crate::store::sql::call::Dialect) -> Self {
                Self { $($field: $statement,)* }
            }
        }
    };
}
pub(in crate::store) use statements;

/// A value that every database can bind.
#[derive(Clone, Copy)]
pub(in crate::store) enum Value<'a> {
    Flag(bool),
    Text(Option<&'a str>),
    Bytes(Option<&'a [u8]>),
    Uuid(Uuid),
    Int(i64),
    /// A time span. Every database can add it to its clock.
    Span(Duration),
    /// For databases that have arrays.
    #[cfg(feature = "postgres")]
    List(List<'a>),
}

/// The values of a column of many rows.
#[cfg(feature = "postgres")]
#[derive(Clone, Copy)]
pub(in crate::store) enum List<'a> {
    Texts(&'a [&'a str]),
    Bytes(&'a [&'a [u8]]),
    Uuids(&'a [Uuid]),
    Ints(&'a [i64]),
}

/// A statement and its values.
pub(in crate::store) struct Call<'a> {
    pub(in crate::store) statement: &'a Statement,
    values: Vec<(&'static str, Value<'a>)>,
}

impl<'a> Call<'a> {
    pub(in crate::store) fn new(statement: &'a Statement) -> Self {
        Self { statement, values: Vec::new() }
    }

    pub(in crate::store) fn with(mut self, name: &'static str, value: impl Into<Value<'a>>) -> Self {
        self.values.push((name, value.into()));
        self
    }

    pub(in crate::store) fn of_key(self, consumer: &'a Consumer, key: &'a IdempotencyKey) -> Self {
        self.with("consumer", consumer.as_str()).with("key", key.as_str())
    }

    pub(in crate::store) fn of_record(
        self,
        consumer: &'a Consumer,
        key: &'a IdempotencyKey,
        record: RecordId,
    ) -> Self {
        self.of_key(consumer, key).with("record", record.as_uuid())
    }

    pub(in crate::store) fn of_attempt(self, attempt: &'a Attempt) -> Self {
        self.of_key(&attempt.consumer, &attempt.key).with("attempt", attempt.id.as_uuid())
    }

    pub(in crate::store) fn of_claim(self, claim: &'a Claim) -> Self {
        self.of_attempt(&claim.attempt)
            .with("record", claim.record_id.as_uuid())
            .with("fingerprint", claim.fingerprint.as_bytes())
            .with("max_abandoned", max_abandoned(claim))
            .with("lease", claim.lease)
            .with("retention", claim.retention)
    }

    /// Returns the values of the statement, in the order in which they are sent.
    ///
    /// # Panics
    ///
    /// Panics if a value is missing: the values after it would take the wrong places.
    pub(in crate::store) fn values(&self) -> impl Iterator<Item = Value<'a>> {
        self.statement.names.iter().map(|name| {
            let value = self.values.iter().find_map(|(known, value)| (known == name).then_some(*value));
            value.unwrap_or_else(|| panic!("a call gives every value of its statement: :{name} is missing"))
        })
    }
}

/// Returns the limit of a claim as far as it fits into its column.
pub(in crate::store) fn max_abandoned(claim: &Claim) -> u32 {
    u32::from(claim.max_abandoned.min(MOST_ABANDONED))
}

impl From<bool> for Value<'_> {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(Some(text))
    }
}

impl<'a> From<Option<&'a str>> for Value<'a> {
    fn from(text: Option<&'a str>) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a [u8]> for Value<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(Some(bytes))
    }
}

impl<'a> From<Option<&'a [u8]>> for Value<'a> {
    fn from(bytes: Option<&'a [u8]>) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<Uuid> for Value<'_> {
    fn from(id: Uuid) -> Self {
        Self::Uuid(id)
    }
}

impl From<u32> for Value<'_> {
    fn from(number: u32) -> Self {
        Self::Int(number.into())
    }
}

impl From<Duration> for Value<'_> {
    fn from(span: Duration) -> Self {
        Self::Span(span)
    }
}

#[cfg(feature = "postgres")]
impl<'a> From<List<'a>> for Value<'a> {
    fn from(list: List<'a>) -> Self {
        Self::List(list)
    }
}

const TABLES: [&str; 4] = ["records", "intents", "phases", "requests"];

/// The aliases of a record, an intent and a kept request.
const ALIASES: [&str; 3] = ["r", "i", "q"];

/// The values of the rules, and the columns of rows that have them.
const COLUMNS: &[(&str, &str)] = &[
    ("consumer", "excluded.consumer"),
    ("key", "excluded.key"),
    ("record", "excluded.id"),
    ("fingerprint", "excluded.fingerprint"),
    ("attempt", "excluded.attempt"),
    ("max_abandoned", "excluded.max_abandoned"),
    ("response", "excluded.response"),
];

/// The largest number that fits into the column, in the dialect where it is smallest.
const MOST_ABANDONED: u16 = i16::MAX.unsigned_abs();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_sent_in_the_order_of_the_statement() {
        let template = "UPDATE {records} AS {r} SET a = :new::text WHERE {r}.b = :old OR :new IS NULL";
        let numbered = Dialect::new(Some('$'), str::to_owned, &[]).statement(template);
        assert_eq!(&*numbered.text, "UPDATE records AS r SET a = $1::text WHERE r.b = $2 OR $1 IS NULL");
        assert!(matches!(values(&numbered)[..], [Value::Text(Some("x")), Value::Int(1)]));

        let unnumbered = Dialect::new(None, str::to_owned, &[]).statement(template);
        assert_eq!(&*unnumbered.text, "UPDATE records AS r SET a = ?::text WHERE r.b = ? OR ? IS NULL");
        assert!(matches!(
            values(&unnumbered)[..],
            [Value::Text(Some("x")), Value::Int(1), Value::Text(Some("x"))]
        ));
    }

    #[test]
    #[should_panic(expected = ":new is missing")]
    fn a_missing_value_does_not_shift_the_others() {
        let statement = Dialect::new(None, str::to_owned, &[]).statement("VALUES (:new, :old)");
        Call::new(&statement).with("old", 1).values().for_each(drop);
    }

    #[test]
    #[should_panic(expected = "{recrods} is a fragment")]
    fn an_unknown_fragment_is_not_sent() {
        Dialect::new(None, str::to_owned, &[]).statement("SELECT 1 FROM {recrods}");
    }

    fn values(statement: &Statement) -> Vec<Value<'_>> {
        let values = [("old", 1.into()), ("unused", true.into()), ("new", "x".into())];
        Call { statement, values: values.into() }.values().collect()
    }
}
