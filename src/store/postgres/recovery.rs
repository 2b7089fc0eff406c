//! Recovery on PostgreSQL.

use async_trait::async_trait;
use sqlx::{Row, postgres::PgRow};

use super::{PostgresStore, call::Call, connection};
use crate::{
    error::StoreError,
    store::sql::recovery::{Engine, Statements, fields_of},
};

#[async_trait]
impl Engine for PostgresStore {
    type Row = PgRow;

    async fn statements(&self) -> Result<&Statements, StoreError> {
        Ok(&self.sql().await?.recovery)
    }

    async fn read(&self, operation: &str, call: Call<'_>) -> Result<Vec<PgRow>, StoreError> {
        self.rows(operation, call).await
    }

    async fn write(&self, operation: &str, calls: Vec<Call<'_>>) -> Result<Vec<Vec<PgRow>>, StoreError> {
        self.sql().await?;
        self.state.connections.script(&self.pool, &self.settings, operation, &calls).await
    }

    fn error(operation: &str, source: sqlx::Error) -> StoreError {
        connection::error(operation, source)
    }
}

fields_of!(PgRow);
