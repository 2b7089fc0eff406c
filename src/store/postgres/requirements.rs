//! Requirements of a server, an account and the tables, without which calls would fail later.

use sqlx::{PgConnection, Row, postgres::PgRow};

use super::{
    ConnectionMode,
    connection::error,
    setup::{column, one_row},
};
use crate::{
    error::StoreError,
    store::sql::{
        call::{Call, Statement},
        errors::misconfigured,
        setup::Identifier,
    },
};

/// Refuses an engine that speaks the protocol of PostgreSQL and does not keep the contract.
pub(super) async fn refuse_other_engines(connection: &mut PgConnection) -> Result<(), StoreError> {
    let row = sqlx::raw_sql("SELECT version() AS version").fetch_one(connection).await;
    let version: String =
        row.and_then(|row| row.try_get("version")).map_err(|source| error("prepare", source))?;
    match other_engine(&version) {
        None => Ok(()),
        Some(engine) => Err(misconfigured(format!(
            "the server is {engine}, which does not lock, skip and address rows as PostgreSQL does: \
             use a PostgreSQL server"
        ))),
    }
}

fn other_engine(version: &str) -> Option<&str> {
    let known = OTHER_ENGINES.into_iter().find(|(sign, _)| version.contains(sign)).map(|(_, name)| name);
    let unknown = (!version.starts_with("PostgreSQL")).then_some(version);
    known.or(unknown)
}

/// Refuses tables that the account cannot use in full, or that are not in one place.
pub(super) async fn check(
    connection: &mut PgConnection,
    mode: ConnectionMode,
    schema: &str,
    prefix: &Identifier,
) -> Result<(), StoreError> {
    let statement = Statement::new(TABLES, Some('$'));
    let tables = format!("{schema}.{prefix}_");
    let call = || Call::new(&statement).with("tables", tables.as_str());
    // Twice, because a pooler can lose a prepared statement between its uses.
    one_row(connection, mode, call()).await?;
    let found = one_row(connection, mode, call()).await?;
    refuse(&found, "lacking", |rights| {
        format!("the account lacks rights: GRANT {rights} to it (in schema {schema})")
    })?;
    refuse(&found, "hidden", |tables| {
        format!(
            "row-level security may hide rows of {tables} (in schema {schema}) from the account, so that \
             requests fail or run again: ALTER TABLE .. DISABLE ROW LEVEL SECURITY, give the account \
             BYPASSRLS, or add a policy FOR ALL TO the account USING (true)"
        )
    })?;
    if !column::<bool>(&found, "citus")? {
        return Ok(());
    }
    let statement = Statement::new(DISTRIBUTED, Some('$'));
    let found = one_row(connection, mode, Call::new(&statement).with("tables", tables.as_str())).await?;
    refuse(&found, "distributed", |tables| {
        format!(
            "Citus has distributed {tables}, on which the store's statements fail: \
             SELECT undistribute_table(..) for each, and keep them local"
        )
    })
}

/// Refuses if the column names something.
fn refuse(found: &PgRow, name: &str, reason: impl FnOnce(&str) -> String) -> Result<(), StoreError> {
    match column::<Option<String>>(found, name)? {
        Some(named) => Err(misconfigured(reason(&named))),
        None => Ok(()),
    }
}

const OTHER_ENGINES: [(&str, &str); 9] = [
    ("CockroachDB", "CockroachDB"),
    ("-YB-", "YugabyteDB"),
    ("Redshift", "Amazon Redshift"),
    ("Greenplum", "Greenplum"),
    ("Cloudberry", "Cloudberry"),
    ("Materialize", "Materialize"),
    ("RisingWave", "RisingWave"),
    ("openGauss", "openGauss"),
    ("CrateDB", "CrateDB"),
];

/// Finds the rights that the account lacks, and the tables whose rows may be hidden from it: row
/// security is active, and for a right that the store needs there is no policy without a condition.
const TABLES: &str = "
WITH needed AS (
    SELECT c.oid, c.relname::text AS name, r.privilege, r.command
    FROM (VALUES ('migrations', 1), ('records', 4), ('intents', 4), ('phases', 4), ('requests', 4))
        AS t (name, rights)
    JOIN (VALUES (1, 'SELECT', 'r'), (2, 'INSERT', 'a'), (3, 'UPDATE', 'w'), (4, 'DELETE', 'd'))
        AS r (number, privilege, command) ON r.number <= t.rights
    JOIN pg_class AS c ON c.oid = to_regclass(:tables || t.name)
), policies AS (
    SELECT p.polrelid, p.polcmd::text AS command, p.polpermissive,
        coalesce(pg_get_expr(p.polqual, p.polrelid), 'true') = 'true'
            AND coalesce(pg_get_expr(p.polwithcheck, p.polrelid), 'true') = 'true' AS open
    FROM pg_policy AS p
    WHERE p.polroles = '{0}' OR EXISTS (
        SELECT FROM pg_roles AS r WHERE r.oid = ANY (p.polroles) AND pg_has_role(r.oid, 'USAGE'))
), lacking AS (
    SELECT string_agg(privilege, ', ') || ' ON ' || name AS rights FROM needed
    WHERE NOT has_table_privilege(oid, privilege) GROUP BY name
), hidden AS (
    SELECT DISTINCT name FROM needed AS n
    WHERE row_security_active(n.oid) AND (
        NOT EXISTS (SELECT FROM policies AS p WHERE p.polrelid = n.oid AND p.command IN ('*', n.command)
            AND p.polpermissive AND p.open)
        OR EXISTS (SELECT FROM policies AS p WHERE p.polrelid = n.oid AND p.command IN ('*', n.command)
            AND NOT p.polpermissive AND NOT p.open))
)
SELECT (SELECT string_agg(rights, ', GRANT ' ORDER BY rights) FROM lacking) AS lacking,
    (SELECT string_agg(name, ', ' ORDER BY name) FROM hidden) AS hidden,
    to_regclass('pg_dist_partition') IS NOT NULL AS citus";

/// Finds tables that Citus has spread over nodes.
const DISTRIBUTED: &str = "
SELECT string_agg(logicalrel::text, ', ') AS distributed FROM pg_dist_partition
WHERE partmethod <> 'n' AND logicalrel IN (to_regclass(:tables || 'records'),
    to_regclass(:tables || 'intents'), to_regclass(:tables || 'phases'), to_regclass(:tables || 'requests'))";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_that_only_speak_the_protocol_are_told_by_their_version() {
        for (version, engine) in [
            ("CockroachDB CCL v23.1.11 (x86_64-pc-linux-gnu)", Some("CockroachDB")),
            ("PostgreSQL 11.2-YB-2.18.0.0-b0 on x86_64-pc-linux-gnu", Some("YugabyteDB")),
            ("PostgreSQL 8.0.2 on i686-pc-linux-gnu, Redshift 1.0.12103", Some("Amazon Redshift")),
            ("DuckDB v1.0", Some("DuckDB v1.0")),
            ("PostgreSQL 16.4 (Debian 16.4-1) on x86_64-pc-linux-gnu", None),
            ("PostgreSQL 15.4 (EnterpriseDB Advanced Server 15.4.0)", None),
        ] {
            assert_eq!(other_engine(version), engine, "{version}");
        }
    }
}
