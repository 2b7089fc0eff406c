//! The databases that have transactions of handlers.

use std::sync::Arc;

use sqlx::{AssertSqlSafe, Database, PgPool, Pool, Postgres, Sqlite, SqlitePool, postgres::PgPoolOptions};
use tower_idempotency::{PostgresStore, SqliteStore, store::Store};

use super::{
    grouping::grouping,
    schema::{Schema, server},
    sqlite::SqliteFile,
};

/// A database that has transactions of handlers.
#[async_trait::async_trait]
pub trait Db: Database {
    /// What a test's tables are in.
    type Home: Send + Sync + 'static;

    /// A query that takes some 3 s.
    const SLOW: &str;

    async fn home() -> Self::Home;
    fn pool(home: &Self::Home, connections: u32) -> Pool<Self>;
    fn store(pool: &Pool<Self>) -> Arc<dyn Store>;
    async fn run(connection: &mut Self::Connection, sql: &str) -> Result<(), sqlx::Error>;
    async fn number(connection: &mut Self::Connection, sql: &str) -> Result<i64, sqlx::Error>;
}

#[async_trait::async_trait]
impl Db for Postgres {
    type Home = Schema;

    const SLOW: &str = "SELECT pg_sleep(3)";

    async fn home() -> Schema {
        Schema::create().await
    }

    fn pool(home: &Schema, connections: u32) -> PgPool {
        let server = server().options([("search_path", &home.name)]);
        PgPoolOptions::new().max_connections(connections).connect_lazy_with(server)
    }

    fn store(pool: &PgPool) -> Arc<dyn Store> {
        Arc::new(PostgresStore::new(pool.clone()).with_grouping(grouping()))
    }

    async fn run(connection: &mut Self::Connection, sql: &str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
    }

    async fn number(connection: &mut Self::Connection, sql: &str) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(format!("SELECT ({sql})::bigint"))).fetch_one(connection).await
    }
}

#[async_trait::async_trait]
impl Db for Sqlite {
    type Home = SqliteFile;

    const SLOW: &str = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 12000000)
        SELECT count(*) FROM n";

    async fn home() -> SqliteFile {
        SqliteFile::new()
    }

    fn pool(home: &SqliteFile, connections: u32) -> SqlitePool {
        let options = sqlx::sqlite::SqlitePoolOptions::new().max_connections(connections);
        options.connect_lazy_with(home.options())
    }

    fn store(pool: &SqlitePool) -> Arc<dyn Store> {
        Arc::new(SqliteStore::new(pool.clone()).with_grouping(grouping()))
    }

    async fn run(connection: &mut Self::Connection, sql: &str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
    }

    async fn number(connection: &mut Self::Connection, sql: &str) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar(AssertSqlSafe(format!("SELECT ({sql})"))).fetch_one(connection).await
    }
}
