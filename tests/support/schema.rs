//! Schemas of one test each, on the server that the environment names.

use std::{sync::Arc, time::Duration};

use sqlx::{
    AssertSqlSafe, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tower_idempotency::{
    PostgresStore,
    store::{ConnectionMode, Store, conformance::Fixture},
};

use super::{grouping::grouping, proxy::Proxy, required_env};

/// A schema that only one test uses.
#[derive(Debug)]
pub struct Schema {
    pub name: String,
    pub pool: PgPool,
}

impl Schema {
    pub async fn create() -> Self {
        Self::create_named(&format!("t_{}", uuid::Uuid::new_v4().simple())).await
    }

    pub async fn create_named(name: &str) -> Self {
        let pool = PgPoolOptions::new().max_connections(4).connect_lazy_with(server());
        let schema = Self { name: name.to_owned(), pool };
        schema.run("CREATE SCHEMA \"{s}\"").await;
        schema
    }

    pub fn store(&self) -> PostgresStore {
        PostgresStore::new(self.pool.clone()).with_schema(&self.name).unwrap().with_grouping(grouping())
    }

    /// A statement in which `{s}` is the schema.
    pub fn sql(&self, sql: &str) -> AssertSqlSafe<String> {
        AssertSqlSafe(sql.replace("{s}", &self.name))
    }

    /// The URL for a server that keeps everything in this schema.
    pub fn url(&self) -> String {
        format!("{}?options=-c%20search_path%3D{}", required_env("TEST_POSTGRES_URL"), self.name)
    }

    /// Runs statements in which `{s}` is the schema.
    pub async fn run(&self, sql: &str) {
        sqlx::raw_sql(self.sql(sql)).execute(&self.pool).await.unwrap();
    }

    /// The one number that a statement returns, in which `{s}` is the schema.
    pub async fn number(&self, sql: &str) -> i64 {
        sqlx::query_scalar(self.sql(&format!("SELECT ({sql})::bigint"))).fetch_one(&self.pool).await.unwrap()
    }
}

#[async_trait::async_trait]
impl Fixture for Schema {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(self.store())
    }

    async fn open_with_clock_ahead(&self, _by: Duration) -> Arc<dyn Store> {
        self.open().await
    }
}

/// A schema that only one test uses, behind a PgBouncer in transaction mode.
#[derive(Debug)]
pub struct PooledSchema(pub Schema);

impl PooledSchema {
    pub async fn create() -> Self {
        Self(Schema::create().await)
    }

    /// A pool through PgBouncer.
    pub fn pool(&self) -> PgPool {
        PgPoolOptions::new().max_connections(16).connect_lazy_with(options("TEST_PGBOUNCER_URL"))
    }

    pub fn store(&self) -> PostgresStore {
        let store = PostgresStore::new(self.pool()).with_schema(&self.0.name).unwrap();
        store.with_connection_mode(ConnectionMode::TransactionPooler).with_grouping(grouping())
    }
}

#[async_trait::async_trait]
impl Fixture for PooledSchema {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(self.store())
    }

    async fn open_with_clock_ahead(&self, _by: Duration) -> Arc<dyn Store> {
        self.open().await
    }
}

/// A network between this URL's client and the server that the environment names, and the URL that goes through it.
pub fn through_proxy(url: &str) -> (Proxy, String) {
    let server = server();
    let address = format!("{}:{}", server.get_host(), server.get_port());
    let proxy = Proxy::start(address.parse().expect("the server is named by its address"));
    let url = url.replace(&address, &proxy.address().to_string());
    (proxy, url)
}

/// The server that the environment names.
pub fn server() -> PgConnectOptions {
    options("TEST_POSTGRES_URL")
}

fn options(variable: &str) -> PgConnectOptions {
    required_env(variable).parse().expect("the variable holds a PostgreSQL URL")
}
