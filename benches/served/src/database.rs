//! The databases of the pairs, on the PostgreSQL that `scripts/bench` has started.

use std::time::Instant;

use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, postgres::PgConnectOptions};

use crate::{Result, load::FIRST_NUMBER};

pub struct Database {
    options: PgConnectOptions,
}

impl Database {
    pub fn at(url: &str, name: &str) -> Result<Self> {
        Ok(Self { options: url.parse::<PgConnectOptions>()?.database(name) })
    }

    async fn connect(&self) -> Result<PgConnection> {
        Ok(PgConnection::connect_with(&self.options).await?)
    }

    pub async fn execute(&self, sql: &str) -> Result<()> {
        let mut connection = self.connect().await?;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await?;
        Ok(connection.close().await?)
    }

    /// The first column of all rows.
    async fn texts(&self, sql: &str) -> Result<Vec<String>> {
        let mut connection = self.connect().await?;
        let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut connection).await?;
        connection.close().await?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
    }

    pub async fn text(&self, sql: &str) -> Result<String> {
        self.texts(sql).await?.pop().ok_or_else(|| format!("no row: {sql}").into())
    }

    /// The server's main process.
    pub async fn process(&self) -> Result<u32> {
        let mut connection = self.connect().await?;
        let backend: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut connection).await?;
        let parent = crate::cpu::parent_of(u32::try_from(backend)?);
        connection.close().await?;
        parent.ok_or_else(|| "the database runs on another machine".into())
    }

    pub async fn deadlocks(&self) -> Result<u64> {
        let count = "SELECT deadlocks::text FROM pg_stat_database WHERE datname = current_database()";
        Ok(self.text(count).await?.parse()?)
    }

    /// Median time of a commit, in µs, if nobody else writes.
    pub async fn commit_time(&self) -> Result<f64> {
        let mut connection = self.connect().await?;
        sqlx::raw_sql("CREATE TABLE IF NOT EXISTS commits (number int)").execute(&mut connection).await?;
        let mut times = Vec::new();
        for number in 0..200 {
            let begin = Instant::now();
            sqlx::query("INSERT INTO commits VALUES ($1)").bind(number).execute(&mut connection).await?;
            times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
        connection.close().await?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    /// Copies the one record of the table under numbered keys, so that each can be replayed.
    pub async fn copy_record(&self, keys: u64) -> Result<()> {
        let (first, last) = (FIRST_NUMBER + 1, FIRST_NUMBER + keys - 1);
        let series = format!("generate_series({first}, {last}) AS i");
        self.execute(&self.copies("'key-' || i", "expires_at", &series).await?).await?;
        self.execute("VACUUM (ANALYZE) idempotency_records").await
    }

    /// Fills the table with copies of its one record under random keys that expire within a day.
    ///
    /// The indexes are made afterwards, which takes a fraction of the time.
    pub async fn fill(&self, records: u64) -> Result<()> {
        let keys = "SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname)
            || '|' || format('ALTER TABLE %s ADD CONSTRAINT %I %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
            FROM pg_constraint WHERE conrelid = 'idempotency_records'::regclass AND contype = 'p'";
        let indexes =
            "SELECT format('DROP INDEX %s', indexrelid::regclass) || '|' || pg_get_indexdef(indexrelid)
            FROM pg_index WHERE indrelid = 'idempotency_records'::regclass AND NOT indisprimary";
        let definitions = [self.texts(keys).await?, self.texts(indexes).await?].concat();
        let definitions: Vec<_> = definitions.iter().filter_map(|pair| pair.split_once('|')).collect();
        let expiry = "now() + random() * interval '24 hours'";
        let series = format!("generate_series(1, {records}) AS i");
        let copies = self.copies("gen_random_uuid()::text", expiry, &series).await?;
        self.execute("ALTER TABLE idempotency_records SET (autovacuum_enabled = off)").await?;
        for (drop, _) in &definitions {
            self.execute(drop).await?;
        }
        self.execute(&copies).await?;
        for (_, make) in &definitions {
            self.execute(&format!("SET maintenance_work_mem = '1GB'; {make}")).await?;
        }
        self.execute("CHECKPOINT").await
    }

    /// Adds records that have expired.
    pub async fn add_expired(&self, records: u64) -> Result<()> {
        let series = format!("generate_series(1, {records}) AS i");
        let copies = self.copies("gen_random_uuid()::text", "now() - interval '1 hour'", &series).await?;
        self.execute(&format!("{copies}; ANALYZE idempotency_records")).await?;
        self.execute("CHECKPOINT").await
    }

    pub async fn expired(&self) -> Result<u64> {
        let count = "SELECT count(*)::text FROM idempotency_records WHERE expires_at < now()";
        Ok(self.text(count).await?.parse()?)
    }

    /// The statement that copies the record of the first key, with whatever columns the table has.
    async fn copies(&self, key: &str, expiry: &str, series: &str) -> Result<String> {
        let columns = self.texts(COLUMNS).await?;
        let values: Vec<_> = columns
            .iter()
            .map(|column| match column.as_str() {
                "key" => key,
                "id" | "attempt" => "gen_random_uuid()",
                "expires_at" => expiry,
                "lease_until" => "now() - interval '2 hours'",
                other => other,
            })
            .collect();
        let (columns, values) = (columns.join(", "), values.join(", "));
        Ok(format!(
            "INSERT INTO idempotency_records ({columns}) SELECT {values} FROM idempotency_records, {series}
             WHERE key = 'key-{FIRST_NUMBER}'"
        ))
    }
}

const COLUMNS: &str = "SELECT attname::text FROM pg_attribute
    WHERE attrelid = 'idempotency_records'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum";
