//! The databases of the candidates.

use std::time::Instant;

use sqlx::{
    AssertSqlSafe, Connection, PgConnection, Row,
    postgres::{PgConnectOptions, PgRow},
};

use crate::{
    Result,
    candidates::{COLUMNS, Candidate},
    costs::OPEN_AT_ONCE,
};

pub(crate) struct Server {
    pub(crate) options: PgConnectOptions,
}

impl Server {
    pub(crate) async fn connect(&self, database: &str) -> Result<PgConnection> {
        let mut sql = PgConnection::connect_with(&self.options.clone().database(database)).await?;
        execute(&mut sql, SESSION).await?;
        Ok(sql)
    }

    async fn execute(&self, text: &str) -> Result<()> {
        let mut sql = PgConnection::connect_with(&self.options).await?;
        execute(&mut sql, text).await?;
        Ok(sql.close().await?)
    }

    pub(crate) async fn drop(&self, database: &str) -> Result<()> {
        self.execute(&format!("DROP DATABASE IF EXISTS {database} WITH (FORCE)")).await
    }

    /// The server's cache does not have a database that was copied as files; this makes the system's forget it too.
    pub(crate) async fn forget(&self, database: &str) -> Result<()> {
        self.execute("CHECKPOINT").await?;
        let forget = "dd if=/dev/null of=$file oflag=nocache conv=notrunc,fdatasync count=0 status=none";
        self.for_each_file(database, forget).await
    }

    pub(crate) async fn remember(&self, database: &str) -> Result<()> {
        self.for_each_file(database, "cat $file").await
    }

    async fn for_each_file(&self, database: &str, command: &str) -> Result<()> {
        let mut sql = PgConnection::connect_with(&self.options).await?;
        let row = query(&mut sql, &format!("SELECT oid::text FROM pg_database WHERE datname = '{database}'"))
            .await?;
        let oid: String = row.first().ok_or("the database exists")?.try_get(0)?;
        let script = format!("cat >/dev/null; for file in base/{oid}/*; do {command}; done >/dev/null");
        execute(&mut sql, &format!("COPY (SELECT 1) TO PROGRAM '{script}'")).await?;
        Ok(sql.close().await?)
    }

    pub(crate) async fn settings(&self) -> Result<String> {
        let mut sql = PgConnection::connect_with(&self.options).await?;
        let row = query(&mut sql, SETTINGS).await?;
        Ok(row.first().ok_or("the settings are one row")?.try_get(0)?)
    }
}

/// Makes the table that all candidates have, in the order in which the intents would have come.
pub(crate) async fn fill(server: &Server, rows: i64) -> Result<()> {
    let started = Instant::now();
    server.execute(&format!("CREATE DATABASE {BASE}")).await?;
    let mut sql = server.connect(BASE).await?;
    execute(&mut sql, include_str!("../../migrations/postgres/0001_records.sql")).await?;
    execute(&mut sql, include_str!("../../migrations/postgres/0002_intents.sql")).await?;
    execute(&mut sql, TABLE).await?;
    execute(&mut sql, &FILL.replace("{columns}", COLUMNS).replace("{rows}", &rows.to_string())).await?;
    for statement in [PRIMARY_KEY, RECORD_INDEX, "VACUUM (FREEZE, ANALYZE) intents"] {
        execute(&mut sql, statement).await?;
    }
    sql.close().await?;
    eprintln!("filled with {rows} rows: {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Copies the table and makes what the candidate adds.
pub(crate) async fn prepare(server: &Server, database: &str, candidate: &Candidate) -> Result<()> {
    server.execute(&format!("CREATE DATABASE {database} TEMPLATE {BASE} STRATEGY file_copy")).await?;
    let mut sql = server.connect(database).await?;
    execute(&mut sql, &format!("ALTER TABLE intents SET (fillfactor = {})", candidate.fillfactor)).await?;
    execute(&mut sql, candidate.ddl).await?;
    let procedure = CHURN
        .replace("{open}", &candidate.open().replace("$1", "intent"))
        .replace("{finalize}", &candidate.finalize().replace("$1", "intent"))
        .replace("{open_at_once}", &OPEN_AT_ONCE.to_string());
    execute(&mut sql, &procedure).await?;
    Ok(sql.close().await?)
}

pub(crate) async fn query(sql: &mut PgConnection, text: &str) -> Result<Vec<PgRow>> {
    Ok(sqlx::raw_sql(AssertSqlSafe(text)).fetch_all(sql).await?)
}

/// Runs statements and takes their time.
pub(crate) async fn execute(sql: &mut PgConnection, text: &str) -> Result<f64> {
    let started = Instant::now();
    sqlx::raw_sql(AssertSqlSafe(text)).execute(sql).await?;
    Ok(started.elapsed().as_secs_f64())
}

pub(crate) const BASE: &str = "intents_index_base";
pub(crate) const REFERENCE: &str = "intents_index_reference";
pub(crate) const COPY: &str = "intents_index_copy";

const SESSION: &str = "SET maintenance_work_mem = '1GB'; SET jit = off";

const TABLE: &str = "
CREATE TABLE intents (LIKE idempotency_intents INCLUDING DEFAULTS INCLUDING CONSTRAINTS)
WITH (autovacuum_enabled = off)";

const PRIMARY_KEY: &str = "ALTER TABLE intents ADD PRIMARY KEY (id)";
const RECORD_INDEX: &str = "CREATE INDEX intents_record_id ON intents (record_id)";

/// Intents of 100 days; 500 of them, all over the table, are open and have been due for a minute at most.
const FILL: &str = "
INSERT INTO intents ({columns})
SELECT gen_random_uuid(), gen_random_uuid(), 'consumer-17', gen_random_uuid()::text, 'charge', '', 0, sha256(int8send(i)), NULL,
       CASE WHEN dangles THEN 'open' ELSE 'finalized' END, true, false, false,
       gen_random_uuid(), gen_random_uuid(), 1, at + interval '1 day', at, at, at + interval '1 minute', 0, 0,
       CASE WHEN NOT dangles THEN at + interval '1 second' END,
       CASE WHEN NOT dangles THEN 'ch_3NqXfM2eZvKYlo2C1ab2cd3e' END,
       CASE WHEN NOT dangles THEN '{\"amount\":2000,\"currency\":\"usd\",\"status\":\"succeeded\"}'::bytea END,
       CASE WHEN dangles THEN now() - random() * interval '1 minute' END
FROM (SELECT i, i % ({rows} / 500) = 0 AS dangles, now() - interval '100 days' * (1 - i::float8 / {rows}) AS at
      FROM generate_series(1::bigint, {rows}) AS i) AS ages";

/// Opens and finalizes intents, `{open_at_once}` at a time, and adds up the seconds of the statements.
const CHURN: &str = "
CREATE PROCEDURE churn(pairs bigint, INOUT opening float8, INOUT finalizing float8) LANGUAGE plpgsql AS $$
DECLARE
    pending uuid[] := array_fill(NULL::uuid, ARRAY[{open_at_once}]);
    place integer;
    intent uuid;
    started timestamptz;
BEGIN
    FOR pair IN 1 .. pairs + {open_at_once} LOOP
        place := pair % {open_at_once} + 1;
        intent := pending[place];
        IF intent IS NOT NULL THEN
            started := clock_timestamp();
            {finalize};
            finalizing := finalizing + extract(epoch FROM clock_timestamp() - started);
            COMMIT;
        END IF;
        intent := CASE WHEN pair <= pairs THEN gen_random_uuid() END;
        pending[place] := intent;
        IF intent IS NOT NULL THEN
            started := clock_timestamp();
            {open};
            opening := opening + extract(epoch FROM clock_timestamp() - started);
            COMMIT;
        END IF;
    END LOOP;
END $$";

const SETTINGS: &str = "
SELECT 'PostgreSQL ' || current_setting('server_version') || string_agg(', ' || name || ' ' || current_setting(name), '')
FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'shared_buffers', 'synchronous_commit')";
