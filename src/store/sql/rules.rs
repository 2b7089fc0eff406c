//! The rules of the contract as SQL. Each rule has the same name here, as a predicate in
//! `memory/entry.rs` and `memory/intents.rs`, and in the docs of [`Store`](crate::store::Store) and
//! [`RecoveryStore`](crate::store::RecoveryStore).

/// Fragments about a record `{r}`, an intent `{i}` and a kept request `{q}`. They may use each
/// other and the fragments of the dialect.
pub(super) const RULES: &[(&str, &str)] = &[
    // The columns that a statement returns of each.
    (
        "record",
        "{r}.consumer, {r}.key, {r}.id, {r}.fingerprint,
         CASE WHEN {held} THEN 'held' ELSE {r}.state END AS state, {r}.attempt,
         CAST({r}.attempt_number AS {bigint}) AS attempt_number,
         CAST(CASE WHEN {exhausted} THEN {r}.abandoned + 1 ELSE {r}.abandoned END AS {bigint}) AS abandoned,
         CAST({r}.unresolved AS {bigint}) AS unresolved,
         {micros(}{r}.lease_until - {now}{micros)} AS lease_left,
         {micros(}{r}.created_at{micros)} AS created_at,
         {micros(}{r}.expires_at{micros)} AS expires_at, {stored}",
    ),
    ("stored", "{r}.response"),
    (
        "intent",
        "{i}.id, {i}.record_id, {i}.consumer, {i}.key, {i}.name, {i}.discriminator,
         CAST({i}.ordinal AS {bigint}) AS ordinal, {i}.arguments, {i}.subject, {i}.state, {i}.sent,
         {i}.resource_id, {i}.payload, {i}.reason, {i}.absent, {i}.attempt, {i}.call,
         CAST({i}.calls AS {bigint}) AS calls,
         {micros(}{i}.created_at{micros)} AS created_at, {micros(}{i}.opened_at{micros)} AS opened_at,
         {micros(}{i}.settled_at{micros)} AS settled_at, {age}, {dangling} AS dangling,
         CAST({i}.looks AS {bigint}) AS looks, CAST({i}.takes AS {bigint}) AS takes,
         CAST({i}.absences AS {bigint}) AS absences, {i}.attention",
    ),
    (
        "request",
        "{q}.record_id, {q}.consumer, {q}.key, {q}.request, CAST({q}.tries AS {bigint}) AS tries,
         {q}.attention",
    ),
    // The assignments of a takeover, by the `{decision}` that was made. An expression that reads an
    // old value stands first, because MySQL evaluates from left to right. Such a dialect first binds
    // `{decided}` to a word: after the first assignment, `{decision}` would see the new expiry.
    (
        "taken",
        "expires_at     = CASE {decided} WHEN 'create' THEN {expiry_if_new}
                          WHEN 'takeover' THEN {expiry_if_leased}
                          ELSE {r}.expires_at END,
         abandoned      = CASE WHEN {decided} = 'create' THEN 0
                          WHEN {decided} IN ('takeover', 'hold') AND {r}.attempt IS NOT NULL
                          THEN {r}.abandoned + 1
                          ELSE {r}.abandoned END,
         attempt_number = CASE {decided} WHEN 'create' THEN 1 WHEN 'takeover' THEN {r}.attempt_number + 1
                          ELSE {r}.attempt_number END,
         id             = CASE {decided} WHEN 'create' THEN :record ELSE {r}.id END,
         fingerprint    = CASE {decided} WHEN 'create' THEN :fingerprint ELSE {r}.fingerprint END,
         state          = CASE {decided} WHEN 'hold' THEN 'held' ELSE 'in_progress' END,
         attempt        = CASE {decided} WHEN 'hold' THEN {r}.attempt ELSE :attempt END,
         max_abandoned  = CASE {decided} WHEN 'create' THEN :max_abandoned ELSE {r}.max_abandoned END,
         lease_until    = CASE {decided} WHEN 'hold' THEN {r}.lease_until ELSE {lease_until} END,
         created_at     = CASE {decided} WHEN 'create' THEN {now} ELSE {r}.created_at END,
         kept           = {decided} <> 'create' AND {retained},
         unresolved     = CASE {decided} WHEN 'create' THEN 0 ELSE {r}.unresolved END,
         repeatable_until = CASE {decided} WHEN 'create' THEN NULL ELSE {r}.repeatable_until END,
         completed_at   = NULL,
         response       = NULL",
    ),
    // The effect of a claim on the record of its key. A dialect may decide in an earlier statement
    // than the one that takes.
    ("decided", "{decision}"),
    (
        "decision",
        "(CASE WHEN {absent} THEN 'create'
              WHEN {r}.state <> 'in_progress' THEN 'show'
              WHEN {r}.attempt = :attempt THEN 'again'
              WHEN {r}.lease_until > {now} OR {r}.fingerprint <> :fingerprint OR {blocked} THEN 'show'
              WHEN {exhausted} THEN 'hold'
              ELSE 'takeover' END)",
    ),
    ("purgeable", "({absent} AND {r}.unresolved = 0)"),
    (
        "absent",
        "({r}.expires_at <= {now} AND NOT {held}
            AND NOT ({r}.state = 'in_progress' AND ({r}.lease_until > {now} OR {r}.unresolved > 0)))",
    ),
    // The expiry of a record.
    ("expiry_if_new", "({now} + :retention)"),
    (
        "expiry_if_freed",
        "CASE WHEN {r}.expires_at <= {now} AND {r}.state <> 'completed'
                  AND ({r}.unresolved > 0 OR {held} OR {r}.lease_until > {now})
              THEN {whole_retention} ELSE {r}.expires_at END",
    ),
    (
        "expiry_if_completed",
        "CASE WHEN {r}.expires_at <= {now} THEN {whole_retention} ELSE {r}.expires_at END",
    ),
    (
        "expiry_if_leased",
        "CASE WHEN {retained} AND {r}.expires_at <= {lease_until}
              THEN {whole_retention} ELSE {r}.expires_at END",
    ),
    ("lease_until", "({now} + {lease})"),
    ("lease", ":lease"),
    ("whole_retention", "{now} + ({r}.expires_at - {r}.created_at)"),
    // Its record waits for the next attempt, and may be given one.
    ("abandoned", "({lapsed} AND NOT {held} AND {r}.expires_at > {now} AND {r}.max_abandoned > 1)"),
    ("releasable", "({resolvable} AND NOT {unrepeatable})"),
    ("resolvable", "({r}.state = 'held' OR {lapsed})"),
    ("held", "({r}.state = 'held' OR {exhausted} OR {blocked})"),
    ("blocked", "({lapsed} AND {unrepeatable})"),
    ("unrepeatable", "COALESCE({r}.repeatable_until <= {now}, FALSE)"),
    ("exhausted", "({lapsed} AND {r}.attempt IS NOT NULL AND {r}.abandoned + 1 >= {r}.max_abandoned)"),
    ("lapsed", "({r}.state = 'in_progress' AND {r}.lease_until <= {now})"),
    ("retained", "{r}.kept"),
    ("mine", "({r}.attempt = :attempt AND {r}.state IN ('in_progress', 'held'))"),
    ("owned", "({this_record} AND {r}.attempt = :attempt AND {leased})"),
    // Its attempt owns the record and may be calling.
    (
        "in_flight",
        "EXISTS (SELECT 1 FROM {records} AS {r} WHERE {record_of_intent} AND {r}.attempt = {i}.attempt
            AND {leased})",
    ),
    ("leased", "({r}.state = 'in_progress' AND {r}.lease_until > {now})"),
    (
        "callable",
        "({i}.state = 'open' AND (NOT {i}.sent OR {i}.repeatable_until > {now} AND :repeatable)
            OR {i}.state = 'dead' AND {i}.absent)",
    ),
    // No call of it can have been sent. An open intent is marked as absent if an earlier call was
    // declared absent, and a dead one as sent.
    ("never_sent", "(NOT {i}.sent AND NOT ({i}.state = 'open' AND {i}.absent))"),
    ("may_have_arrived", "({i}.state = 'open' AND {i}.sent)"),
    ("repeatable_until", "(CASE WHEN :repeatable THEN {now} + :repeatable_for ELSE {never} END)"),
    ("dangling", "({i}.state = 'open' AND {i}.dangling_at <= {now})"),
    ("age", "{micros(}{now} - {i}.created_at{micros)} AS age"),
    // Conditions that find a record by its key, by its id, or by an intent or a request.
    ("this_record", "{this_key} AND {r}.id = :record"),
    ("this_key", "{r}.consumer = :consumer AND {r}.key = :key"),
    ("record_of_intent", "{r}.consumer = {i}.consumer AND {r}.key = {i}.key AND {r}.id = {i}.record_id"),
    ("record_of_request", "{r}.consumer = {q}.consumer AND {r}.key = {q}.key AND {r}.id = {q}.record_id"),
];
