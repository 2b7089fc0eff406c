//! Recovery on SQLite.

use async_trait::async_trait;
use sqlx::{Row, sqlite::SqliteRow};

use super::{Prepared, SqliteStore, connection, prepared, statements};
use crate::{
    error::StoreError,
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

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, SqlitePool};

    use super::*;
    use crate::store::{sql::Identifier, sqlite::statements::Statements as Every};

    #[tokio::test]
    async fn what_operators_and_reconcilers_ask_for_is_found_by_its_index() {
        let pool = SqlitePool::connect("sqlite::memory:").await.unwrap();
        let mut database = pool.acquire().await.unwrap();
        for migration in [
            include_str!("../../../migrations/sqlite/0001_records.sql"),
            include_str!("../../../migrations/sqlite/0002_intents.sql"),
        ] {
            sqlx::raw_sql(migration).execute(&mut *database).await.unwrap();
        }
        let Statements { list_open, list_dangling, list_attention, list_dead, count, take_dangling, .. } =
            Every::new(&Identifier::default_prefix()).recovery;
        for (statement, index) in [
            (list_open, "look_at"),
            (list_dangling, "look_at"),
            (list_attention, "look_at"),
            (count, "look_at"),
            (take_dangling, "look_at"),
            (list_dead, "dead"),
        ] {
            let plan = sqlx::raw_sql(AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}")))
                .fetch_all(&mut *database)
                .await
                .unwrap();
            let plan: Vec<String> = plan.iter().map(|row| row.get("detail")).collect();
            let used = format!("INDEX idempotency_intents_{index}");
            assert!(plan.iter().any(|step| step.contains(&used)), "{plan:#?}");
            let walks = |step: &String| step.contains("idempotency_intents") && !step.contains(&used);
            assert!(!plan.iter().any(walks), "{plan:#?}");
        }
    }
}
