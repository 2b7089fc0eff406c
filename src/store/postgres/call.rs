//! Either way of sending a statement.

use std::fmt::Write;

use sqlx::{
    AssertSqlSafe, Postgres,
    postgres::{PgArguments, PgConnection, PgRow, types::PgInterval},
    query::Query,
};
use uuid::Uuid;

use super::ConnectionMode;
use crate::store::sql;
pub(super) use crate::store::sql::call::{Call, Value};

impl<'a> Call<'a> {
    /// Runs the statement to its end.
    ///
    /// sqlx prepares and executes even an unnamed statement in two steps, between which a transaction pooler may
    /// change the server connection. Through one, the statement is sent as text with its values in it.
    pub(super) async fn fetch_all(
        self,
        connection: &mut PgConnection,
        mode: ConnectionMode,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        match mode {
            ConnectionMode::Direct => self.prepared().fetch_all(connection).await,
            ConnectionMode::TransactionPooler => {
                sqlx::raw_sql(AssertSqlSafe(self.text())).fetch_all(connection).await
            }
        }
    }

    /// Runs the statement on a connection of somebody else's, inside a transaction, in which a pooler keeps to one server
    /// connection. That of a pooler must not be left a prepared statement.
    pub(super) async fn fetch_all_inside(
        self,
        connection: &mut PgConnection,
        mode: ConnectionMode,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        self.prepared().persistent(mode == ConnectionMode::Direct).fetch_all(connection).await
    }

    fn prepared(self) -> Query<'a, Postgres, PgArguments> {
        let query = sqlx::query(AssertSqlSafe(self.sql));
        self.values.into_iter().fold(query, |query, value| match value {
            Value::Null => query.bind(None::<String>),
            Value::Flag(flag) => query.bind(flag),
            Value::Text(text) => query.bind(text),
            Value::Bytes(bytes) => query.bind(bytes),
            Value::Uuid(id) => query.bind(id),
            Value::Small(number) => query.bind(number),
            Value::Int(number) => query.bind(number),
            Value::Span(span) => {
                query.bind(PgInterval { months: 0, days: 0, microseconds: sql::micros(span) })
            }
            Value::Texts(texts) => query.bind(texts),
            Value::Uuids(ids) => query.bind(ids),
            Value::Ints(numbers) => query.bind(numbers),
        })
    }

    /// The statement with its values in it.
    pub(super) fn text(&self) -> String {
        let mut parts = self.sql.split('$');
        let mut text = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            let position = part[..digits].parse::<usize>().ok().and_then(|position| position.checked_sub(1));
            if let Some(value) = position.and_then(|position| self.values.get(position)) {
                value.write(&mut text);
            }
            text.push_str(&part[digits..]);
        }
        text
    }
}

impl Value<'_> {
    /// Writes the value as an expression. What came from a client goes in as hexadecimal digits, which no setting of
    /// the server reads as anything else.
    fn write(&self, text: &mut String) {
        match self {
            Self::Null => text.push_str("NULL"),
            Self::Flag(flag) => text.push_str(if *flag { "TRUE" } else { "FALSE" }),
            Self::Text(value) => write_text(text, value),
            Self::Bytes(bytes) => write_bytes(text, bytes),
            Self::Uuid(id) => write_uuid(text, id),
            Self::Small(number) => write_int(text, i64::from(*number)),
            Self::Int(number) => write_int(text, *number),
            Self::Span(span) => {
                let _ = write!(text, "({} * interval '1 microsecond')", sql::micros(*span));
            }
            Self::Texts(values) => write_array(text, values, |text, value| write_text(text, value)),
            Self::Uuids(ids) => write_array(text, ids, write_uuid),
            Self::Ints(numbers) => write_array(text, numbers, |text, number| write_int(text, *number)),
        }
    }
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

fn write_uuid(text: &mut String, id: &Uuid) {
    // Writing to a string does not fail.
    let _ = write!(text, "'{id}'::uuid");
}

fn write_int(text: &mut String, number: i64) {
    let _ = write!(text, "({number})");
}

fn write_array<T>(text: &mut String, values: &[T], write: impl Fn(&mut String, &T)) {
    text.push_str("ARRAY[");
    for (position, value) in values.iter().enumerate() {
        if position > 0 {
            text.push(',');
        }
        write(text, value);
    }
    text.push(']');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_leave_its_place() {
        let call = Call::new("SELECT $2, $1::text, $3").with(Value::Text("'$2\\")).with(Value::Int(-7));
        let text = call.with(Value::Texts(vec!["a", "'"])).text();
        let expected = "SELECT (-7), convert_from(decode('2724325c', 'hex'), 'UTF8')::text, \
                        ARRAY[convert_from(decode('61', 'hex'), 'UTF8'),convert_from(decode('27', 'hex'), 'UTF8')]";
        assert_eq!(text, expected);
    }
}
