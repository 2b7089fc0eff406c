//! Outcomes that come late, and records that end while something is under way.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    http::{Extensions, StatusCode},
    response::{IntoResponse, Response},
};
use sqlx::{
    Postgres, Sqlite,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{sync::mpsc, time::sleep};
use tower_idempotency::{
    CallFailure, Idempotency, IdempotencyLayer, IntentError, PostgresStore, Reaper, RejectionCode, Resource,
    Tx, TxError,
    intent::{IntentFilter, IntentState, OpenIntent, Opened},
    store::{ConnectionMode, Fenced, IntentFence, IntentUpdate},
};

use crate::{
    hooked::{Hook, Hooked},
    phases::{Node, Site, on_both_stores},
    shop::until,
    support::{db::Db, direct, required_env, schema::Schema, served::Count},
};

on_both_stores!(
    a_late_lookup_does_not_count_after_an_operator_wants_it_looked_up_again,
    a_resource_that_turns_up_after_another_call_was_not_sent_is_not_made_again,
    a_resource_that_turns_up_after_two_declared_absences_is_not_made_again,
    what_is_completed_after_its_expiry_is_replayed,
    what_an_attempt_has_done_past_the_expiry_is_not_done_again,
    what_an_attempt_has_done_shortly_before_the_expiry_is_not_done_again,
);

/// A charge whose reply is lost, at an upstream that does not deduplicate.
async fn lose_a_charge<DB: Db>(site: &Site<DB>) {
    let handler = async |idempotency: Idempotency| {
        let call = async |_| Err(CallFailure::unknown("reply lost"));
        let short = Duration::from_millis(200);
        let made = idempotency.intent("charge").with_timeout(short).with_grace(short).call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    site.node(handler).send().await.assert_refused(RejectionCode::OutcomeUnknown);
    sleep(Duration::from_millis(450)).await;
}

async fn a_late_lookup_does_not_count_after_an_operator_wants_it_looked_up_again<DB: Db>(site: Site<DB>) {
    lose_a_charge(&site).await;
    let recovery = site.store.recovery().unwrap();
    // This reconciler has asked in the wrong place, was told that there is no charge, and is frozen.
    let late =
        recovery.take_dangling(&["charge".to_owned()], 10, Duration::from_secs(60)).await.unwrap().remove(0);
    let again = IntentUpdate::LookAgain { after: Duration::ZERO, absences: 0 };
    let key = late.upstream_key;
    assert_eq!(
        recovery.update_intent(key, IntentFence::Operator, &again, None).await.unwrap(),
        Fenced::Applied
    );
    sleep(Duration::from_millis(20)).await;
    let taken =
        recovery.take_dangling(&["charge".to_owned()], 10, Duration::from_secs(60)).await.unwrap().remove(0);
    assert_eq!((taken.looks, taken.absences), (1, 0));
    let absent = IntentUpdate::Absent(None);
    let fenced = recovery.update_intent(key, late.lookup_fence(), &absent, None).await.unwrap();
    assert_eq!(fenced, Fenced::Lost, "{:?}", recovery.get_intent(key).await);
    let found = IntentUpdate::Finalize(Resource::new("ch_1"));
    let fenced = recovery.update_intent(key, taken.lookup_fence(), &found, None).await.unwrap();
    assert_eq!(fenced, Fenced::Applied);
}

/// What attempts do with a charge, one after the other.
#[derive(Clone)]
enum Step {
    /// Sends it, and is frozen before the reply is there.
    Freeze(mpsc::UnboundedSender<OpenIntent>),
    NotSent,
    Charge,
}

fn charging<DB: Db>(site: &Site<DB>, steps: &[Step]) -> (Node, Count) {
    let steps = Arc::new(Mutex::new(steps.iter().rev().cloned().collect::<Vec<_>>()));
    let charges = Count::default();
    let counter = charges.clone();
    let handler = async move |idempotency: Idempotency| {
        let step = steps.lock().unwrap().pop().unwrap_or(Step::Charge);
        let intent = match idempotency.intent("charge").open().await {
            Ok(Opened::Call(intent)) => intent,
            Ok(Opened::Finalized(made)) => return (StatusCode::CREATED, made.id).into_response(),
            Ok(Opened::Refused(_)) => panic!("nobody refuses"),
            Err(error) => return error.into_response(),
        };
        match step {
            Step::Freeze(sender) => {
                counter.add();
                sender.send(intent).unwrap();
                StatusCode::INTERNAL_SERVER_ERROR.into_response()
            }
            Step::NotSent => {
                intent.not_sent().await.unwrap();
                StatusCode::SERVICE_UNAVAILABLE.into_response()
            }
            Step::Charge => {
                let id = format!("ch_{}", counter.add());
                intent.finalize(id.clone()).await.unwrap();
                (StatusCode::CREATED, id).into_response()
            }
        }
    };
    (site.node(handler), charges)
}

async fn declare_absent<DB: Db>(site: &Site<DB>) {
    let recovery = site.store.recovery().unwrap();
    let open = recovery.list_intents(IntentFilter::Open, 10).await.unwrap().remove(0);
    let absent = IntentUpdate::Absent(None);
    let fenced = recovery.update_intent(open.upstream_key, IntentFence::Operator, &absent, None).await;
    assert_eq!(fenced.unwrap(), Fenced::Applied);
}

async fn assert_reported<DB: Db>(site: &Site<DB>) {
    let recovery = site.store.recovery().unwrap();
    let reported = recovery.list_intents(IntentFilter::NeedsAttention, 10).await.unwrap();
    assert_eq!(reported.len(), 1);
    assert_eq!(reported[0].state, IntentState::Finalized(Resource::new("ch_1")));
}

async fn a_resource_that_turns_up_after_another_call_was_not_sent_is_not_made_again<DB: Db>(site: Site<DB>) {
    let (sender, mut frozen) = mpsc::unbounded_channel();
    let (node, charges) = charging(&site, &[Step::Freeze(sender), Step::NotSent]);
    assert_eq!(node.send().await.status, StatusCode::INTERNAL_SERVER_ERROR);
    declare_absent(&site).await;
    assert_eq!(node.send().await.status, StatusCode::SERVICE_UNAVAILABLE);
    // The first process goes on.
    frozen.recv().await.unwrap().finalize("ch_1").await.unwrap();
    let answer = node.send().await;
    assert_eq!((charges.get(), &answer.body[..]), (1, &b"ch_1"[..]), "charged twice: {answer:?}");
    assert_reported(&site).await;
}

async fn a_resource_that_turns_up_after_two_declared_absences_is_not_made_again<DB: Db>(site: Site<DB>) {
    let (sender, mut frozen) = mpsc::unbounded_channel();
    let (node, charges) = charging(&site, &[Step::Freeze(sender), Step::NotSent]);
    assert_eq!(node.send().await.status, StatusCode::INTERNAL_SERVER_ERROR);
    declare_absent(&site).await;
    assert_eq!(node.send().await.status, StatusCode::SERVICE_UNAVAILABLE);
    declare_absent(&site).await;
    frozen.recv().await.unwrap().finalize("ch_1").await.unwrap();
    let answer = node.send().await;
    assert_eq!((charges.get(), &answer.body[..]), (1, &b"ch_1"[..]), "charged twice: {answer:?}");
    assert_reported(&site).await;
}

const RETENTION: Duration = Duration::from_secs(6);

fn short(layer: IdempotencyLayer) -> IdempotencyLayer {
    layer
        .with_retention(Duration::from_secs(600 + 31))
        .with_lease(Duration::from_secs(2))
        .with_max_execution(Duration::from_secs(4))
        .with_retention(RETENTION)
        .with_reaper(Reaper::off())
}

/// Of a request without a key, whose record is not kept for longer than its handler runs.
async fn what_is_completed_after_its_expiry_is_replayed<DB: Db>(site: Site<DB>) {
    for in_transaction in [false, true] {
        let runs = Count::default();
        let counter = runs.clone();
        let handler = async move |extensions: Extensions| {
            if in_transaction {
                let mut tx = Tx::<DB>::begin(&extensions).await?;
                DB::run(&mut tx, "INSERT INTO steps VALUES ('step')").await?;
            }
            sleep(Duration::from_millis(2500)).await;
            Ok::<_, TxError>((StatusCode::CREATED, format!("run {} {in_transaction}", counter.add())))
        };
        let node = site.node_with(handler, |layer| {
            layer.with_derived_key(Duration::from_secs(2)).with_reaper(Reaper::off())
        });
        let charge = || {
            let mut request = direct::charge("key");
            request.headers_mut().remove("idempotency-key");
            request.headers_mut().insert("content-type", format!("text/{in_transaction}").parse().unwrap());
            request
        };
        let first = direct::send(&node.router, charge()).await;
        assert_eq!(first.status, StatusCode::CREATED, "{first:?}");
        first.assert_same_replay(&direct::send(&node.router, charge()).await);
        assert_eq!(runs.get(), 1);
    }
}

/// A trigger ends the lease: stands for a server that stops for a moment between two statements.
#[tokio::test(flavor = "multi_thread")]
async fn an_intent_whose_lease_ends_while_it_is_opened_is_called_or_withdrawn() {
    let site = Site::<Sqlite>::open().await;
    let calls = Count::default();
    let counter = calls.clone();
    let handler = async move |idempotency: Idempotency| {
        let call = async |_| Ok(Resource::new(format!("ch_{}", counter.add())));
        let made = idempotency.intent("charge").call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let node = site.node_with(handler, |layer| layer.with_reaper(Reaper::off()));
    node.handle.prepare().await.unwrap();
    site.run(
        "CREATE TRIGGER slow AFTER INSERT ON idempotency_intents BEGIN UPDATE idempotency_records SET lease_until = 0; END",
    )
    .await;
    node.send().await;
    site.run("DROP TRIGGER slow").await;
    sleep(Duration::from_millis(500)).await;
    let answer = node.send().await;
    assert_eq!((answer.status, calls.get()), (StatusCode::CREATED, 1), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resource_with_an_odd_id_is_recorded_though_the_reply_is_lost() {
    let site = Site::<Sqlite>::open().await;
    let store = Hooked::new(&site.store).on_settling(Hook::LoseReply);
    let handler = async |idempotency: Idempotency| {
        let made = idempotency.intent("charge").call(async |_| Ok(Resource::new("ch\0"))).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let layer = IdempotencyLayer::new(store);
    let router = axum::Router::new().route("/charges", axum::routing::post(handler)).layer(layer.clone());
    let node = Node { router, handle: layer.handle() };
    let answer = node.send().await;
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
}

/// The statement that nobody waits for ends at about the moment at which the server is told to end its transaction.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_phase_whose_statement_ends_while_it_is_given_up_is_rolled_back() {
    let site = Site::<Postgres>::open().await;
    let dropped_after = Duration::from_millis(50);
    let handler = async move |idempotency: Idempotency| {
        let late: i64 = idempotency.key().as_str().parse().unwrap();
        let step = async |tx: &mut sqlx::PgConnection| {
            sqlx::query("INSERT INTO steps VALUES ('step')").execute(&mut *tx).await?;
            // A rollback waits for a second.
            let sleep =
                format!("SELECT pg_sleep({})", 1.05 + f64::from(i32::try_from(late).unwrap()) / 2000.0);
            sqlx::query(sqlx::AssertSqlSafe(sleep)).execute(tx).await?;
            Ok::<_, TxError>(())
        };
        let _ = tokio::time::timeout(dropped_after, idempotency.phase("step", step)).await;
        StatusCode::SERVICE_UNAVAILABLE
    };
    let node = site.node(handler);
    let mut held = Vec::new();
    for batch in 0..12 {
        let sent = (0..4).map(|n| {
            let router = node.router.clone();
            tokio::spawn(async move {
                direct::send(&router, direct::charge(&format!("\"{}\"", batch * 4 + n))).await
            })
        });
        for answer in futures(sent.collect()).await {
            assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{answer:?}");
        }
        sleep(Duration::from_millis(1300)).await;
        held.extend(node.handle.list(tower_idempotency::store::RecordFilter::Held, 100).await.unwrap());
    }
    assert!(held.is_empty(), "{:?}", held.iter().map(|record| &record.key).collect::<Vec<_>>());
}

async fn futures<T>(tasks: Vec<tokio::task::JoinHandle<T>>) -> Vec<T> {
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await.unwrap());
    }
    all
}

/// Behind a transaction pooler no start-up option sets the isolation of the store's own transactions.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn calls_of_one_request_at_once_do_not_collide_whatever_the_isolation() {
    let schema = Schema::create().await;
    for isolation in ["repeatable read", "serializable"] {
        let options: PgConnectOptions = required_env("TEST_POSTGRES_URL").parse().unwrap();
        let options = options.options([("default_transaction_isolation", isolation)]);
        let pool = PgPoolOptions::new().max_connections(8).connect_lazy_with(options);
        let store = PostgresStore::new(pool)
            .with_schema(&schema.name)
            .unwrap()
            .with_connection_mode(ConnectionMode::TransactionPooler);
        let handler = async |idempotency: Idempotency| {
            let mut calls = tokio::task::JoinSet::new();
            for recipient in 0..8 {
                let idempotency = idempotency.clone();
                calls.spawn(async move {
                    let call = async |_| Ok(Resource::new(recipient.to_string()));
                    idempotency
                        .intent("payout")
                        .of(recipient)
                        .call(call)
                        .await
                        .map_err(|error| format!("{error:?}"))
                });
            }
            let failed: Vec<_> = calls.join_all().await.into_iter().filter_map(Result::err).collect();
            let status =
                if failed.is_empty() { StatusCode::CREATED } else { StatusCode::INTERNAL_SERVER_ERROR };
            (status, format!("{failed:?}"))
        };
        let layer = IdempotencyLayer::new(store);
        let router = axum::Router::new().route("/charges", axum::routing::post(handler)).layer(layer);
        let answer = direct::send(&router, direct::charge(&format!("\"{isolation}\""))).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{isolation}: {answer:?}");
    }
}

/// A process charges, renews its lease past the expiry of the record, and dies.
async fn what_an_attempt_has_done_past_the_expiry_is_not_done_again<DB: Db>(site: Site<DB>) {
    charge_and_die(site, RETENTION / 2, RETENTION * 11 / 20).await;
}

/// It dies before it has renewed its lease, which outlives the expiry.
async fn what_an_attempt_has_done_shortly_before_the_expiry_is_not_done_again<DB: Db>(site: Site<DB>) {
    charge_and_die(site, RETENTION * 3 / 4, Duration::ZERO).await;
}

async fn charge_and_die<DB: Db>(site: Site<DB>, starts_after: Duration, dies_after: Duration) {
    let (runs, charges) = (Count::default(), Count::default());
    let (runs_, counter) = (runs.clone(), charges.clone());
    let handler = async move |idempotency: Idempotency| -> Response {
        let run = runs_.add();
        let call = async |_| match run {
            1 => Err(CallFailure::not_sent("upstream is down")),
            _ => Ok(Resource::new(format!("ch_{}", counter.add()))),
        };
        match idempotency.intent("charge").call(call).await {
            Ok(_) if run == 2 => std::future::pending().await,
            Ok(made) => (StatusCode::CREATED, made.id).into_response(),
            Err(error) => error.into_response(),
        }
    };
    let (node, other) = (site.node_with(handler.clone(), short), site.another_node_with(handler, short));
    node.send().await.assert_refused(RejectionCode::UpstreamUnavailable);
    sleep(starts_after).await;
    let hanging = tokio::runtime::Runtime::new().unwrap();
    hanging.spawn(async move { other.send().await });
    let recovery = site.store.recovery().unwrap();
    let open = async || recovery.list_intents(IntentFilter::Open, 1).await.unwrap();
    until("the charge", async || charges.get() > 0 && open().await.is_empty()).await;
    sleep(dies_after).await;
    hanging.shutdown_background();
    assert_eq!((runs.get(), charges.get()), (2, 1));
    sleep(RETENTION / 4).await;
    let retry = node.send_after_end().await;
    assert_eq!((charges.get(), &retry.body[..]), (1, &b"ch_1"[..]), "charged twice: {retry:?}");
}
