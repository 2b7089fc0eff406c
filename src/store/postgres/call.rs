//! The two ways in which a statement is sent.

use std::{fmt::Write, sync::Arc};

use sqlx::{
    AssertSqlSafe, Postgres,
    postgres::{PgArguments, PgConnection, PgRow, types::PgInterval},
    query::Query,
};

use super::ConnectionMode;
use crate::store::sql::{
    call::{Call, List, Value},
    micros,
};

impl<'a> Call<'a> {
    /// Runs the statement to its end and returns its rows.
    ///
    /// sqlx prepares and executes even an unnamed statement in two steps, and a transaction pooler
    /// may change the server connection between them. Through such a pooler, the statement is sent
    /// as text with its values in it.
    pub(super) async fn fetch_all(
        self,
        connection: &mut PgConnection,
        mode: ConnectionMode,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        match mode {
            ConnectionMode::Direct => self.prepared().fetch_all(connection).await,
            ConnectionMode::TransactionPooler => {
                sqlx::raw_sql(AssertSqlSafe(self.message(mode))).fetch_all(connection).await
            }
        }
    }

    /// Runs the statement to its end and returns the number of rows that it has changed.
    pub(super) async fn execute(
        self,
        connection: &mut PgConnection,
        mode: ConnectionMode,
    ) -> Result<u64, sqlx::Error> {
        let done = match mode {
            ConnectionMode::Direct => self.prepared().execute(connection).await,
            ConnectionMode::TransactionPooler => {
                sqlx::raw_sql(AssertSqlSafe(self.message(mode))).execute(connection).await
            }
        };
        done.map(|done| done.rows_affected())
    }

    /// Runs the statement on a connection of the application, inside a transaction. A pooler does
    /// not change the server connection there, but no prepared statement may stay on it.
    pub(super) async fn fetch_all_inside(
        self,
        connection: &mut PgConnection,
        mode: ConnectionMode,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        self.prepared().persistent(mode == ConnectionMode::Direct).fetch_all(connection).await
    }

    fn prepared(self) -> Query<'a, Postgres, PgArguments> {
        let query = sqlx::query(AssertSqlSafe(Arc::clone(&self.statement.text)));
        self.values().fold(query, |query, value| match value {
            Value::Flag(flag) => query.bind(flag),
            Value::Text(text) => query.bind(text),
            Value::Bytes(bytes) => query.bind(bytes),
            Value::Uuid(id) => query.bind(id),
            Value::Int(number) => query.bind(number),
            Value::List(List::Texts(list)) => query.bind(list),
            Value::List(List::Bytes(list)) => query.bind(list),
            Value::List(List::Uuids(list)) => query.bind(list),
            Value::List(List::Ints(list)) => query.bind(list),
            Value::Span(span) => query.bind(PgInterval { months: 0, days: 0, microseconds: micros(span) }),
        })
    }

    fn message(&self, mode: ConnectionMode) -> String {
        let mut statements = mode.prelude().to_vec();
        let text = self.text();
        statements.push(&text);
        statements.join(";")
    }

    /// Returns the statement as text, with its values in it.
    pub(super) fn text(&self) -> String {
        let values = self.values().collect::<Vec<_>>();
        let mut parts = self.statement.text.split('$');
        let mut text = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            let position = part[..digits].parse::<usize>().ok().and_then(|position| position.checked_sub(1));
            if let Some(value) = position.and_then(|position| values.get(position)) {
                value.write(&mut text);
            }
            text.push_str(&part[digits..]);
        }
        text
    }
}

impl Value<'_> {
    /// Writes the value as an expression. Text and bytes, which may come from a client, are written
    /// as hexadecimal digits: no setting of the server reads those as anything else.
    fn write(&self, text: &mut String) {
        match self {
            Self::Text(None) | Self::Bytes(None) => text.push_str("NULL"),
            Self::Flag(flag) => text.push_str(if *flag { "TRUE" } else { "FALSE" }),
            Self::Text(Some(value)) => write_text(text, value),
            Self::Bytes(Some(bytes)) => write_bytes(text, bytes),
            // Writing to a string does not fail.
            Self::Uuid(id) => drop(write!(text, "'{id}'::uuid")),
            Self::Int(number) => drop(write!(text, "({number})")),
            Self::List(List::Texts(list)) => write_list(text, list, |text| Value::Text(Some(text))),
            Self::List(List::Bytes(list)) => write_list(text, list, |bytes| Value::Bytes(Some(bytes))),
            Self::List(List::Uuids(list)) => write_list(text, list, Value::Uuid),
            Self::List(List::Ints(list)) => write_list(text, list, Value::Int),
            Self::Span(span) => drop(write!(text, "({} * interval '1 microsecond')", micros(*span))),
        }
    }
}

fn write_list<'a, T: Copy>(text: &mut String, list: &[T], value: impl Fn(T) -> Value<'a>) {
    text.push_str("ARRAY[");
    for (place, item) in list.iter().enumerate() {
        text.push_str(if place > 0 { "," } else { "" });
        value(*item).write(text);
    }
    text.push(']');
}

fn write_text(text: &mut String, value: &str) {
    text.push_str("convert_from(");
    write_bytes(text, value.as_bytes());
    text.push_str(", 'UTF8')");
}

fn write_bytes(text: &mut String, bytes: &[u8]) {
    text.push_str("decode('");
    text.reserve(bytes.len() * 2);
    for byte in bytes {
        text.push(hexadecimal(byte >> 4));
        text.push(hexadecimal(byte & 0xf));
    }
    text.push_str("', 'hex')");
}

fn hexadecimal(digit: u8) -> char {
    char::from_digit(u32::from(digit), 16).unwrap_or('0')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sql::call::Dialect;

    #[test]
    fn a_value_cannot_leave_its_place() {
        let statement =
            Dialect::new(Some('$'), str::to_owned, &[]).statement("SELECT :number, :text::text, :missing");
        let call =
            Call::new(&statement).with("text", "'$2\\").with("number", 7).with("missing", None::<&[u8]>);
        let expected = "SELECT (7), convert_from(decode('2724325c', 'hex'), 'UTF8')::text, NULL";
        assert_eq!(call.text(), expected);
    }
}
