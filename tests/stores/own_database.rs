//! A PostgreSQL database that only one test uses, and that can be dropped.

use sqlx::{
    AssertSqlSafe, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tower_idempotency::PostgresStore;

use crate::support::schema::server;

#[derive(Debug)]
pub(crate) struct OwnDatabase {
    pub(crate) name: String,
    admin: PgPool,
}

impl OwnDatabase {
    pub(crate) async fn create() -> Self {
        Self::create_with("").await
    }

    /// With options of CREATE DATABASE.
    pub(crate) async fn create_with(options: &str) -> Self {
        let name = format!("d_{}", uuid::Uuid::new_v4().simple());
        let admin = PgPoolOptions::new().max_connections(1).connect_lazy_with(server());
        let database = Self { name, admin };
        database.run(&format!("CREATE DATABASE {{d}} {options}")).await.unwrap();
        database
    }

    pub(crate) fn options(&self) -> PgConnectOptions {
        server().database(&self.name)
    }

    pub(crate) fn pool(&self) -> PgPool {
        PgPoolOptions::new().max_connections(4).connect_lazy_with(self.options())
    }

    pub(crate) fn store(&self) -> PostgresStore {
        PostgresStore::new(self.pool())
    }

    /// Runs a statement outside of the database, in which `{d}` is its name.
    pub(crate) async fn run(&self, sql: &str) -> Result<(), sqlx::Error> {
        let sql = AssertSqlSafe(sql.replace("{d}", &self.name));
        sqlx::raw_sql(sql).execute(&self.admin).await.map(drop)
    }

    /// The number of sessions in it.
    pub(crate) async fn sessions(&self) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1";
        sqlx::query_scalar(sql).bind(&self.name).fetch_one(&self.admin).await.unwrap()
    }

    pub(crate) async fn must_drop_by_force(&self) {
        self.run("DROP DATABASE {d} WITH (FORCE)").await.unwrap();
    }

    /// Drops it, which the server refuses while there are sessions.
    pub(crate) async fn must_drop(&self) {
        self.run("DROP DATABASE {d}").await.expect("no session is left");
    }
}
