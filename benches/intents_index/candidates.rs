//! What is compared, and the statements that write to it and search it.

pub(crate) struct Candidate {
    pub(crate) name: &'static str,
    pub(crate) fillfactor: u8,
    /// What it adds to the table.
    pub(crate) ddl: &'static str,
    pub(crate) open_intents: OpenIntents,
    pub(crate) find: &'static str,
    /// Whether batches of the purge are measured.
    pub(crate) purge: bool,
}

/// Where it is written that an intent is open.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum OpenIntents {
    /// In its row.
    InPlace,
    /// In a row of a second table too, which finalizing deletes.
    Beside,
    /// In a row of a second table too, which is deleted before the next search.
    Swept,
    /// In its row, and the index gets it before the next search if it is still open then.
    Promoted,
    /// The row is in a second table, and finalizing moves it.
    Moved,
}

impl Candidate {
    /// The statement that opens intent `$1`.
    pub(crate) fn open(&self) -> String {
        let insert = |table, look_at| format!("INSERT INTO {table} ({COLUMNS}) SELECT {OPENED}, {look_at}");
        match self.open_intents {
            OpenIntents::InPlace => insert("intents", LOOK_AT),
            OpenIntents::Promoted => insert("intents", "NULL"),
            OpenIntents::Beside | OpenIntents::Swept => format!(
                "WITH beside AS (INSERT INTO open_intents (id, look_at) VALUES ($1, {LOOK_AT})) {}",
                insert("intents", "NULL")
            ),
            OpenIntents::Moved => format!(
                "{} WHERE NOT EXISTS (SELECT FROM intents WHERE id = $1)",
                insert("open_intents", LOOK_AT)
            ),
        }
    }

    /// The statement that finalizes intent `$1`.
    pub(crate) fn finalize(&self) -> String {
        // Found by its id: the planner takes open ones for so rare that an index on the state tempts it.
        let update = format!("UPDATE intents SET {FINALIZED} WHERE id = $1 AND (state = 'open') IS TRUE");
        match self.open_intents {
            OpenIntents::InPlace | OpenIntents::Promoted | OpenIntents::Swept => update,
            OpenIntents::Beside => {
                format!("WITH beside AS (DELETE FROM open_intents WHERE id = $1) {update}")
            }
            OpenIntents::Moved => MOVE.replace("{columns}", COLUMNS),
        }
    }
}

pub(crate) const CANDIDATES: &[Candidate] = &[
    Candidate {
        name: "no further index",
        fillfactor: 100,
        ddl: "",
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: true,
    },
    Candidate {
        name: "no further index, fillfactor 85",
        fillfactor: 85,
        ddl: "",
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "no further index, fillfactor 70",
        fillfactor: 70,
        ddl: "",
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "B-tree (state, look_at)",
        fillfactor: 100,
        ddl: "CREATE INDEX ON intents (state, look_at)",
        open_intents: OpenIntents::InPlace,
        find: "SELECT id FROM intents WHERE state = 'open' AND look_at <= now() ORDER BY look_at LIMIT 100 FOR UPDATE SKIP LOCKED",
        purge: false,
    },
    Candidate {
        name: "B-tree (look_at)",
        fillfactor: 100,
        ddl: "CREATE INDEX ON intents (look_at)",
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "partial (look_at), not null",
        fillfactor: 100,
        ddl: PARTIAL,
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "partial (look_at), not null, fillfactor 70",
        fillfactor: 70,
        ddl: PARTIAL,
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "partial (created_at), not settled",
        fillfactor: 100,
        ddl: "CREATE INDEX ON intents (created_at) WHERE settled_at IS NULL AND state <> 'dead'",
        open_intents: OpenIntents::InPlace,
        find: "SELECT id FROM intents WHERE settled_at IS NULL AND state <> 'dead' AND created_at <= now() - interval '1 minute' AND look_at <= now() ORDER BY created_at LIMIT 100 FOR UPDATE SKIP LOCKED",
        purge: false,
    },
    Candidate {
        name: "BRIN (created_at), fillfactor 70",
        fillfactor: 70,
        ddl: "CREATE INDEX ON intents USING brin (created_at)",
        open_intents: OpenIntents::InPlace,
        find: "SELECT id FROM intents WHERE created_at <= now() - interval '1 minute' AND look_at <= now() ORDER BY look_at LIMIT 100 FOR UPDATE SKIP LOCKED",
        purge: true,
    },
    Candidate {
        name: "table of open intents, fillfactor 70",
        fillfactor: 70,
        ddl: BESIDE,
        open_intents: OpenIntents::Beside,
        find: FIND_BESIDE,
        purge: false,
    },
    Candidate {
        name: "the same, swept by the reconciler",
        fillfactor: 70,
        ddl: BESIDE_SWEPT,
        open_intents: OpenIntents::Swept,
        find: FIND_BESIDE,
        purge: false,
    },
    Candidate {
        name: "open intents moved when finalized",
        fillfactor: 100,
        ddl: MOVED,
        open_intents: OpenIntents::Moved,
        find: "SELECT id FROM open_intents WHERE look_at <= now() ORDER BY look_at LIMIT 100 FOR UPDATE SKIP LOCKED",
        purge: false,
    },
    Candidate {
        name: "B-tree (created_at), partial (look_at) of those found open, fillfactor 70",
        fillfactor: 70,
        ddl: PROMOTED,
        open_intents: OpenIntents::Promoted,
        find: FIND,
        purge: false,
    },
    Candidate {
        name: "B-tree (created_at), fillfactor 70",
        fillfactor: 70,
        ddl: BY_AGE,
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: true,
    },
    Candidate {
        name: "partial (created_at), finalized, fillfactor 70",
        fillfactor: 70,
        ddl: "CREATE INDEX ON intents (created_at) WHERE state = 'finalized'",
        open_intents: OpenIntents::InPlace,
        find: FIND,
        purge: true,
    },
];

const FIND: &str =
    "SELECT id FROM intents WHERE look_at <= now() ORDER BY look_at LIMIT 100 FOR UPDATE SKIP LOCKED";

const FIND_BESIDE: &str = "
SELECT i.id, i.arguments FROM open_intents AS o JOIN intents AS i ON i.id = o.id
WHERE o.look_at <= now() ORDER BY o.look_at LIMIT 100 FOR UPDATE OF o SKIP LOCKED";

pub(crate) const SWEEP: &str = "
DELETE FROM open_intents AS o USING intents AS i
WHERE i.id = o.id AND o.look_at <= now() AND i.settled_at IS NOT NULL";

/// What has stayed open since the last search; the reconciler would remember when that was.
pub(crate) const PROMOTE: &str = "
UPDATE intents SET look_at = dangling_at
WHERE created_at > now() - interval '1 hour' AND created_at <= now() AND state = 'open' AND look_at IS NULL";

const PARTIAL: &str = "CREATE INDEX ON intents (look_at) WHERE look_at IS NOT NULL";

const BY_AGE: &str = "CREATE INDEX ON intents (created_at)";

const PROMOTED: &str = "
CREATE INDEX ON intents (created_at);
CREATE INDEX ON intents (look_at) WHERE look_at IS NOT NULL";

const BESIDE: &str = "
CREATE TABLE open_intents (id uuid PRIMARY KEY, look_at timestamptz NOT NULL) WITH (autovacuum_enabled = off);
INSERT INTO open_intents SELECT id, look_at FROM intents WHERE look_at IS NOT NULL;
CREATE INDEX ON open_intents (look_at)";

const BESIDE_SWEPT: &str = "
CREATE TABLE open_intents (id uuid, look_at timestamptz NOT NULL) WITH (autovacuum_enabled = off);
INSERT INTO open_intents SELECT id, look_at FROM intents WHERE look_at IS NOT NULL;
CREATE INDEX ON open_intents (look_at)";

const MOVED: &str = "
CREATE TABLE open_intents (LIKE intents INCLUDING DEFAULTS, PRIMARY KEY (id)) WITH (autovacuum_enabled = off);
INSERT INTO open_intents SELECT * FROM intents WHERE look_at IS NOT NULL;
DELETE FROM intents WHERE look_at IS NOT NULL;
CREATE INDEX ON open_intents (look_at)";

const MOVE: &str = "
WITH moved AS (DELETE FROM open_intents WHERE id = $1 RETURNING *)
INSERT INTO intents ({columns})
SELECT id, record_id, consumer, key, name, discriminator, ordinal, arguments, subject, 'finalized', sent,
       sent_before, absent, attempt, call, calls, repeatable_until, created_at, opened_at, dangling_at, looks, absences,
       now(), 'ch_3NqXfM2eZvKYlo2C1ab2cd3e', '{\"amount\":2000,\"currency\":\"usd\",\"status\":\"succeeded\"}', NULL
FROM moved";

pub(crate) const COLUMNS: &str = "
    id, record_id, consumer, key, name, discriminator, ordinal, arguments, subject, state, sent, sent_before, absent,
    attempt, call, calls, repeatable_until, created_at, opened_at, dangling_at, looks, absences,
    settled_at, resource_id, payload, look_at";

/// The values of an intent that was just opened, all but the last.
const OPENED: &str = "
    $1, gen_random_uuid(), 'consumer-17', gen_random_uuid()::text, 'charge', '', 0, sha256(uuid_send($1)), NULL, 'open', true,
    false, false, gen_random_uuid(), gen_random_uuid(), 1, now() + interval '1 day', now(), now(), now() + interval '1 minute', 0, 0,
    NULL, NULL, NULL";

/// Before every dangling intent of the fill, so that a search has to pass what finalizing has left in an index.
const LOOK_AT: &str = "now() - interval '1 day'";

const FINALIZED: &str = "
    state = 'finalized', settled_at = now(), resource_id = 'ch_3NqXfM2eZvKYlo2C1ab2cd3e', look_at = NULL,
    payload = '{\"amount\":2000,\"currency\":\"usd\",\"status\":\"succeeded\"}'";
