//! Recovery on SQLite.

use async_trait::async_trait;
use sqlx::{Row, sqlite::SqliteRow};

use super::{Prepared, SqliteStore, connection, prepared, statements};
use crate::{
    StoreError,
    store::sql::{
        call::{Call, Value},
        recovery::{Engine, Statements, fields_of},
    },
};

#[async_trait]
impl Engine for SqliteStore {
    type Row = SqliteRow;

    async fn statements(&self) -> Result<&Statements, StoreError> {
        Ok(&self.sql().await?.recovery)
    }

    async fn read(&self, operation: &str, call: Call<'_>) -> Result<Vec<SqliteRow>, StoreError> {
        self.read(operation, query_of(call)).await
    }

    async fn write(&self, operation: &str, calls: Vec<Call<'_>>) -> Result<Vec<Vec<SqliteRow>>, StoreError> {
        let connections = &self.state.connections;
        let _turn = connections.turn().await?;
        let mut transaction = connections.begin(&self.pool, "BEGIN IMMEDIATE".to_owned()).await?;
        let mut replies = Vec::with_capacity(calls.len());
        for call in calls {
            let rows = query_of(call).fetch_all(&mut *transaction).await;
            replies.push(rows.map_err(|source| connection::error(operation, source))?);
        }
        transaction.commit().await.map_err(|source| connection::error(operation, source))?;
        Ok(replies)
    }

    fn error(operation: &str, source: sqlx::Error) -> StoreError {
        connection::error(operation, source)
    }
}

fn query_of(call: Call<'_>) -> Prepared<'_> {
    call.values.into_iter().fold(prepared(&call.sql), |query, value| match value {
        Value::Null => query.bind(None::<i64>),
        Value::Flag(flag) => query.bind(flag),
        Value::Text(text) => query.bind(text),
        Value::Bytes(bytes) => query.bind(bytes),
        Value::Uuid(id) => query.bind(id),
        Value::Int(number) => query.bind(number),
        Value::Span(span) => query.bind(statements::millis(span)),
        #[cfg(feature = "postgres")]
        Value::Small(number) => query.bind(number),
        #[cfg(feature = "postgres")]
        Value::Texts(_) | Value::Uuids(_) | Value::Ints(_) => query,
    })
}

fields_of!(SqliteRow);
