//! An application that pays out through a bank, and a bank that a test directs.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use sqlx::{Database, Pool, Sqlite};
use tokio::{sync::watch, task::JoinHandle, time::sleep};
use tower_idempotency::{
    CallFailure, Idempotency, IdempotencyHandle, IdempotencyKey, IdempotencyLayer, Intent, Lookup, Reaper,
    Reconcile, Reconciler, RejectionCode, Resource, UpstreamKey,
    intent::IntentFilter,
    store::{Record, Store},
};

use crate::support::{
    app::consumer,
    db::Db,
    direct::{self, Answer},
};

/// What a test has of a database: the application's store, and a way to let time pass.
pub(crate) struct World<DB: Db> {
    home: DB::Home,
    watcher: Pool<DB>,
    pub(crate) store: Arc<dyn Store>,
}

impl<DB: Db> World<DB> {
    pub(crate) async fn open() -> Self {
        let home = DB::home().await;
        let (watcher, pool) = (DB::pool(&home, 2), DB::pool(&home, 8));
        Self { home, watcher, store: DB::store(&pool) }
    }

    /// The store of another process.
    pub(crate) fn another_store(&self) -> Arc<dyn Store> {
        DB::store(&DB::pool(&self.home, 8))
    }

    /// A node of the application. Its leases are not over before the test is, unless time is made to pass.
    pub(crate) fn node(&self, bank: &Bank) -> Node {
        Node::new(Arc::clone(&self.store), bank, Reaper::off())
    }

    /// Makes everything in these columns of a table a day older, but for what is far away.
    async fn age(&self, table: &str, columns: &[&str]) {
        let day = if DB::NAME == Sqlite::NAME { "86400000" } else { "interval '1 day'" };
        let older = columns.iter().map(|column| format!("{column} = {column} - {day}"));
        self.run(&format!("UPDATE idempotency_{table} SET {}", older.collect::<Vec<_>>().join(", "))).await;
    }

    /// A day passes for intents: those that wait to be looked up are due.
    pub(crate) async fn age_intents(&self) {
        self.age("intents", &["look_at", "dangling_at", "created_at", "opened_at", "repeatable_until"]).await;
    }

    /// Seconds pass for intents that wait to be looked up.
    pub(crate) async fn age_intents_by_seconds(&self, seconds: u32) {
        let past = match DB::NAME == Sqlite::NAME {
            true => format!("{seconds}000"),
            false => format!("interval '{seconds} seconds'"),
        };
        self.run(&format!("UPDATE idempotency_intents SET look_at = look_at - {past}")).await;
    }

    pub(crate) async fn end_leases(&self) {
        self.age("records", &["lease_until"]).await;
    }

    /// Records are past their expiry.
    pub(crate) async fn expire_records(&self) {
        for _ in 0..2 {
            self.age("records", &["expires_at", "lease_until"]).await;
        }
    }

    pub(crate) async fn run(&self, sql: &str) {
        DB::run(&mut *self.watcher.acquire().await.unwrap(), sql).await.unwrap();
    }

    pub(crate) async fn number(&self, sql: &str) -> i64 {
        DB::number(&mut *self.watcher.acquire().await.unwrap(), sql).await.unwrap()
    }
}

/// One node.
#[derive(Clone)]
pub(crate) struct Node {
    router: Router,
    pub(crate) handle: IdempotencyHandle,
}

impl Node {
    pub(crate) fn new(store: Arc<dyn Store>, bank: &Bank, reaper: Reaper) -> Self {
        let layer =
            IdempotencyLayer::new(store).with_lease(LONG).with_reaper(reaper).with_store_timeout(PATIENCE);
        let bank = bank.clone();
        let handler = move |idempotency: Idempotency| async move { pay_out(&bank, &idempotency).await };
        let handle = layer.handle();
        Self { router: Router::new().route("/charges", post(handler)).layer(layer), handle }
    }

    /// Sends the request for a payout with this key, and again if a busy disk was too slow for the store.
    pub(crate) async fn pay(&self, key: &str) -> Answer {
        let request = || direct::charge(&format!("\"{key}\""));
        let sent = async {
            loop {
                let answer = direct::send(&self.router, request()).await;
                if answer.rejection != Some(RejectionCode::StoreUnavailable) {
                    return answer;
                }
            }
        };
        tokio::time::timeout(PATIENCE, sent).await.expect("an answer")
    }

    pub(crate) fn start(&self, key: &'static str) -> JoinHandle<Answer> {
        let node = self.clone();
        tokio::spawn(async move { node.pay(key).await })
    }

    pub(crate) async fn record(&self, key: &str) -> Option<Record> {
        self.handle.get(&consumer(), &IdempotencyKey::new(key).unwrap()).await.unwrap()
    }

    pub(crate) async fn need_attention(&self) -> Vec<Intent> {
        let mut intents = self.handle.list_intents(IntentFilter::NeedsAttention, 100).await.unwrap();
        intents.sort_by(|one, other| one.key.as_str().cmp(other.key.as_str()));
        intents
    }
}

async fn pay_out(bank: &Bank, idempotency: &Idempotency) -> Response {
    let name = idempotency.key().as_str().to_owned();
    let transfer = idempotency.intent("bank.transfer").with_arguments(&("DE02", 1000)).with_subject(&name);
    match transfer.call(async |key| bank.transfer(&name, key).await).await {
        Ok(resource) => (StatusCode::CREATED, resource.id).into_response(),
        Err(error) => error.into_response(),
    }
}

/// A bank, in which the client's key names a transfer for the test.
#[derive(Clone, Default)]
pub(crate) struct Bank(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    /// How many transfers and look-ups wait.
    waiting: watch::Sender<usize>,
    open: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    calls: Vec<(String, UpstreamKey)>,
    lookups: HashMap<UpstreamKey, usize>,
    transfer: Option<Transfer>,
    answers: HashMap<String, Vec<Say>>,
}

/// How a transfer goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Transfer {
    Made,
    Unknown,
    NotSent,
    /// Made, once the test says so.
    Waits,
}

/// What a look-up comes to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Say {
    Found,
    NotFound,
    Unknown,
    Fails,
    Panics,
    Hangs,
    /// Waits until the test says so, and has found nothing.
    WaitsAndFindsNothing,
}

impl Bank {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// How transfers go from now on.
    pub(crate) fn transfers(&self, transfer: Transfer) {
        self.state().transfer = Some(transfer);
    }

    /// What look-ups of the transfer with this name come to, one after the other; the last one for good.
    pub(crate) fn says(&self, name: &str, answers: &[Say]) {
        self.state().answers.insert(name.to_owned(), answers.iter().rev().copied().collect());
    }

    /// The upstream keys of the calls of the transfer with this name.
    pub(crate) fn calls(&self, name: &str) -> Vec<UpstreamKey> {
        let state = self.state();
        state.calls.iter().filter(|(called, _)| called == name).map(|(_, key)| *key).collect()
    }

    /// How often each call was looked up.
    pub(crate) fn lookups(&self) -> HashMap<UpstreamKey, usize> {
        self.state().lookups.clone()
    }

    /// Waits until that many transfers and look-ups wait.
    pub(crate) async fn until_waiting(&self, count: usize) {
        let mut waiting = self.0.waiting.subscribe();
        let reached = tokio::time::timeout(PATIENCE, waiting.wait_for(|waiting| *waiting >= count)).await;
        assert!(reached.is_ok(), "waited in vain for {count} to wait");
    }

    /// Nobody waits any more.
    pub(crate) fn open(&self) {
        self.0.open.send_replace(true);
    }

    async fn wait(&self) {
        self.0.waiting.send_modify(|waiting| *waiting += 1);
        let _ = self.0.open.subscribe().wait_for(|open| *open).await;
    }

    async fn transfer(&self, name: &str, key: UpstreamKey) -> Result<Resource, CallFailure> {
        let transfer = {
            let mut state = self.state();
            state.calls.push((name.to_owned(), key));
            state.transfer.unwrap_or(Transfer::Made)
        };
        match transfer {
            Transfer::Made => {}
            Transfer::Waits => self.wait().await,
            Transfer::Unknown => return Err(CallFailure::unknown("reset")),
            Transfer::NotSent => return Err(CallFailure::not_sent("no connection")),
        }
        Ok(Resource::new(made(name)))
    }

    pub(crate) fn reconciler(&self) -> Reconciler {
        Reconciler::new().on("bank.transfer", self.clone())
    }
}

#[async_trait::async_trait]
impl Reconcile for Bank {
    async fn reconcile(&self, intent: &Intent) -> Result<Lookup, Box<dyn std::error::Error + Send + Sync>> {
        assert_eq!(intent.name, "bank.transfer");
        let name = intent.subject.clone().unwrap();
        let say = {
            let mut state = self.state();
            *state.lookups.entry(intent.upstream_key).or_default() += 1;
            let answers = state.answers.get_mut(&name).unwrap();
            if answers.len() > 1 { answers.pop().unwrap() } else { answers[0] }
        };
        Ok(match say {
            Say::Found => Lookup::Found(Resource::new(made(&name)).with_payload("looked up")),
            Say::NotFound => Lookup::NotFound,
            Say::Unknown => Lookup::Unknown,
            Say::Fails => return Err("503".into()),
            Say::Panics => panic!("the look-up panics, as it should in this test"),
            Say::Hangs => std::future::pending().await,
            Say::WaitsAndFindsNothing => {
                self.wait().await;
                Lookup::NotFound
            }
        })
    }
}

/// What the bank calls the transfer with this name.
pub(crate) fn made(name: &str) -> String {
    format!("transfer of {name}")
}

/// Waits for what comes about by itself.
pub(crate) async fn until<F>(what: &str, reached: impl Fn() -> F)
where
    F: Future<Output = bool>,
{
    let deadline = Instant::now() + PATIENCE;
    while !reached().await {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Makes a test of each function, on each store.
macro_rules! on_both_stores {
    ($($test:ident),* $(,)?) => {$(
        mod $test {
            #[tokio::test(flavor = "multi_thread")]
            async fn sqlite() {
                super::$test($crate::payouts::World::<sqlx::Sqlite>::open().await).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            #[ignore = "needs PostgreSQL: run scripts/test"]
            async fn postgres() {
                super::$test($crate::payouts::World::<sqlx::Postgres>::open().await).await;
            }
        }
    )*};
}
pub(crate) use on_both_stores;

const LONG: Duration = Duration::from_secs(1000);
const PATIENCE: Duration = Duration::from_secs(30);
