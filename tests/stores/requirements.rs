//! What `prepare` finds out before a request does: rights, row-level security, poolers, engines and locks.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use sqlx::{Executor, postgres::PgPoolOptions};
use tower_idempotency::{
    PostgresStore,
    store::{ConnectionMode, Store, StoreErrorKind, TableCreation},
};

use crate::support::{
    claim, free_port, must_name,
    schema::{Schema, server},
    wait_for, win,
};

/// A schema with tables, and an account that owns nothing in it.
struct Account {
    schema: Schema,
    role: String,
}

impl Account {
    async fn create() -> Self {
        let schema = Schema::create().await;
        schema.store().migrate().await.unwrap();
        let role = format!("r_{}", schema.name);
        let account = Self { schema, role };
        account.run("CREATE ROLE {r} LOGIN; GRANT USAGE ON SCHEMA {s} TO {r}").await;
        account.run("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {s} TO {r}").await;
        account
    }

    /// Runs statements in which `{s}` is the schema and `{r}` the role.
    async fn run(&self, sql: &str) {
        self.schema.run(&sql.replace("{r}", &self.role)).await;
    }

    fn store(&self, creation: TableCreation) -> PostgresStore {
        let pool = PgPoolOptions::new().connect_lazy_with(server().username(&self.role));
        PostgresStore::new(pool).with_schema(&self.schema.name).unwrap().with_table_creation(creation)
    }

    async fn must_refuse(&self, names: &[&str]) {
        for creation in [TableCreation::Automatic, TableCreation::Manual] {
            let error = self.store(creation).prepare().await.unwrap_err();
            for name in names {
                must_name(&error, name);
            }
        }
    }

    async fn works(&self) {
        let store = self.store(TableCreation::Manual);
        store.prepare().await.unwrap();
        win(&store, &claim(&uuid::Uuid::new_v4().to_string())).await;
    }

    async fn drop(self) {
        self.run("DROP OWNED BY {r}; DROP ROLE {r}").await;
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn an_account_that_lacks_a_right_on_any_table_is_refused_by_prepare() {
    let account = Account::create().await;
    account.works().await;
    for table in ["records", "intents", "phases", "requests"] {
        for right in ["SELECT", "INSERT", "UPDATE", "DELETE"] {
            account.run(&format!("REVOKE {right} ON {{s}}.idempotency_{table} FROM {{r}}")).await;
            account.must_refuse(&["GRANT", right, &format!("idempotency_{table}")]).await;
            account.run(&format!("GRANT {right} ON {{s}}.idempotency_{table} TO {{r}}")).await;
        }
    }
    account.run("REVOKE INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {s} FROM {r}").await;
    account.must_refuse(&["INSERT, UPDATE, DELETE ON idempotency_intents", "idempotency_records"]).await;
    account.drop().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn row_level_security_that_may_hide_rows_is_refused_by_prepare() {
    let account = Account::create().await;
    for table in ["records", "intents", "phases", "requests"] {
        let table = format!("{{s}}.idempotency_{table}");
        account.run(&format!("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")).await;
        account.must_refuse(&["row-level security", "BYPASSRLS"]).await;
        account.run(&format!("CREATE POLICY own_rows ON {table} TO {{r}} USING (consumer = 'acme')")).await;
        account.must_refuse(&["row-level security"]).await;
        account.run(&format!("CREATE POLICY reading ON {table} FOR SELECT TO {{r}} USING (true)")).await;
        account.must_refuse(&["row-level security"]).await;
        account.run(&format!("CREATE POLICY all_rows ON {table} TO PUBLIC USING (true)")).await;
        account.works().await;
        account
            .run(&format!("CREATE POLICY narrow ON {table} AS RESTRICTIVE USING (consumer = 'acme')"))
            .await;
        account.must_refuse(&["row-level security"]).await;
        account.run(&format!("ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")).await;
        account.works().await;
    }
    account.drop().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn row_level_security_that_is_forced_on_the_owner_is_refused_by_prepare() {
    let account = Account::create().await;
    account.run("ALTER TABLE {s}.idempotency_records OWNER TO {r}").await;
    account.run("ALTER TABLE {s}.idempotency_records ENABLE ROW LEVEL SECURITY").await;
    account.works().await;
    account.run("ALTER TABLE {s}.idempotency_records FORCE ROW LEVEL SECURITY").await;
    account.must_refuse(&["row-level security"]).await;
    account.run("ALTER ROLE {r} BYPASSRLS").await;
    account.works().await;
    account.drop().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_role_that_may_not_end_its_own_sessions_is_reported() {
    let account = Account::create().await;
    account.run("CREATE ROLE {r}_login LOGIN; GRANT {r} TO {r}_login").await;
    let role = account.role.clone();
    let options = PgPoolOptions::new().after_connect(move |connection, _| {
        let set = sqlx::AssertSqlSafe(format!("SET ROLE {role}"));
        Box::pin(async move { connection.execute(sqlx::raw_sql(set)).await.map(drop) })
    });
    let pool = options.connect_lazy_with(server().username(&format!("{}_login", account.role)));
    let store = PostgresStore::new(pool).with_schema(&account.schema.name).unwrap();
    let warnings = store.prepare().await.unwrap();
    assert!(warnings.iter().any(|warning| warning.contains("SET ROLE")), "{warnings:?}");
    win(&store, &claim("k")).await;
    store.close().await;
    account.run("DROP OWNED BY {r}_login; DROP ROLE {r}_login").await;
    account.drop().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn another_engine_is_refused_by_its_name() {
    let schema = Schema::create().await;
    for (version, name) in [
        ("CockroachDB CCL v23.1.11 (x86_64-pc-linux-gnu)", "CockroachDB"),
        ("PostgreSQL 11.2-YB-2.18.0.0-b0 on x86_64", "YugabyteDB"),
    ] {
        schema
            .run(&format!(
                "CREATE OR REPLACE FUNCTION {{s}}.version() RETURNS text LANGUAGE sql AS $$ SELECT '{version}' $$"
            ))
            .await;
        let pool = PgPoolOptions::new().connect_lazy_with(with_path(&schema));
        must_name(&PostgresStore::new(pool).prepare().await.unwrap_err(), name);
    }
    assert_eq!(schema.number("SELECT count(*) FROM pg_tables WHERE schemaname = '{s}'").await, 0);
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn tables_that_citus_has_distributed_are_refused() {
    let schema = Schema::create().await;
    schema.store().migrate().await.unwrap();
    schema.run("CREATE TABLE {s}.pg_dist_partition (logicalrel regclass, partmethod \"char\")").await;
    let store = || PostgresStore::new(PgPoolOptions::new().connect_lazy_with(with_path(&schema)));
    store().prepare().await.unwrap();
    schema.run("INSERT INTO {s}.pg_dist_partition VALUES ('{s}.idempotency_intents', 'h')").await;
    must_name(&store().prepare().await.unwrap_err(), "idempotency_intents");
}

/// The server of the tests flushes nothing, as Neon's compute reports of itself.
#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn neon_is_not_blamed_for_settings_that_it_has_by_design() {
    let schema = Schema::create().await;
    let with = |options: sqlx::postgres::PgConnectOptions| {
        PostgresStore::new(PgPoolOptions::new().connect_lazy_with(options)).with_schema(&schema.name).unwrap()
    };
    let warnings = with(server()).prepare().await.unwrap();
    assert!(warnings.iter().any(|warning| warning.contains("fsync")), "{warnings:?}");
    let neon = server().options([("neon.timeline_id", "0123")]);
    assert_eq!(with(neon.clone()).prepare().await.unwrap(), Vec::<String>::new());
    let lossy = with(neon.options([("synchronous_commit", "off")])).prepare().await.unwrap();
    assert!(lossy.iter().any(|warning| warning.contains("synchronous_commit")), "{lossy:?}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_pooler_that_ignores_start_up_options_is_refused_without_its_mode() {
    let schema = Schema::create().await;
    let bouncer = tokio::task::block_in_place(Bouncer::start);
    let store = || {
        let pool = PgPoolOptions::new().connect_lazy_with(server().host("127.0.0.1").port(bouncer.port));
        PostgresStore::new(pool).with_schema(&schema.name).unwrap()
    };
    must_name(&store().prepare().await.unwrap_err(), "TransactionPooler");
    must_name(&store().claim(&claim("k")).await.unwrap_err(), "TransactionPooler");
    let pooled = store().with_connection_mode(ConnectionMode::TransactionPooler);
    win(&pooled, &claim("k")).await;
    // The refused store has changed no setting of a session that others share.
    let shared = PgPoolOptions::new()
        .connect_lazy_with(server().host("127.0.0.1").port(bouncer.port).statement_cache_capacity(0));
    let row = sqlx::raw_sql("SELECT current_setting('enable_seqscan') AS seqscan")
        .fetch_one(&shared)
        .await
        .unwrap();
    assert_eq!(sqlx::Row::get::<String, _>(&row, "seqscan"), "on");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_migration_that_waits_lets_the_other_nodes_work() {
    let schema = Schema::create().await;
    let old = include_str!("../../migrations/postgres/0001_records.sql");
    schema.run(&format!("BEGIN; SET LOCAL search_path = \"{{s}}\"; {old}; COMMIT")).await;
    let mut open = schema.pool.begin().await.unwrap();
    open.execute(schema.sql("SELECT count(*) FROM {s}.idempotency_records")).await.unwrap();

    let store = schema.store();
    let migrating = tokio::spawn(async move { store.migrate().await });
    // An old node: its statements wait behind the migration for as long as that waits.
    let slowest = async {
        let mut slowest = Duration::ZERO;
        for _ in 0..40 {
            let begun = Instant::now();
            let pool = &schema.pool;
            let insert = schema.sql("SELECT count(*) FROM {s}.idempotency_records WHERE key = 'k'");
            sqlx::raw_sql(insert).execute(pool).await.unwrap();
            slowest = slowest.max(begun.elapsed());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        slowest
    };
    let slowest = slowest.await;
    assert!(!migrating.is_finished());
    assert!(slowest < Duration::from_secs(3), "a statement waited for {slowest:?}");
    open.rollback().await.unwrap();
    migrating.await.unwrap().unwrap();
    assert_eq!(schema.number("SELECT max(version) FROM {s}.idempotency_migrations").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_migration_gives_up_and_says_what_to_do() {
    let schema = Schema::create().await;
    let old = include_str!("../../migrations/postgres/0001_records.sql");
    schema.run(&format!("BEGIN; SET LOCAL search_path = \"{{s}}\"; {old}; COMMIT")).await;
    let mut open = schema.pool.begin().await.unwrap();
    open.execute(schema.sql("SELECT count(*) FROM {s}.idempotency_records")).await.unwrap();
    let store = schema.store();
    let gave_up = store.claim(&claim("k")).await.unwrap_err();
    assert_eq!(gave_up.kind(), StoreErrorKind::Unavailable, "{gave_up:?}");
    assert!(gave_up.to_string().contains("pg_stat_activity"), "{gave_up}");
    open.rollback().await.unwrap();
    win(&store, &claim("k")).await;
}

fn with_path(schema: &Schema) -> sqlx::postgres::PgConnectOptions {
    server().options([("search_path", format!("{},pg_catalog", schema.name))])
}

/// A PgBouncer in transaction mode that ignores the start-up parameter `options`.
struct Bouncer {
    process: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Bouncer {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let settings = format!(
            "[databases]\n* = host=127.0.0.1 port={} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n\
             ignore_startup_parameters = extra_float_digits, options\n",
            server().get_port()
        );
        let file = folder.path().join("pgbouncer.ini");
        std::fs::write(&file, settings).unwrap();
        open_to_all(folder.path());
        let mut command = if rustix::process::geteuid().is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--", "pgbouncer"]);
            command
        } else {
            Command::new("pgbouncer")
        };
        let command =
            command.arg("-q").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().unwrap();
        wait_for("PgBouncer", || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
        Self { process, port, _folder: folder }
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn open_to_all(folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
}
