//! A database with accounts and charges, and nodes whose handlers write to them in a transaction.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::Request,
    handler::Handler,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use sqlx::Pool;
use tokio::{
    sync::Semaphore,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tower_idempotency::{
    IdempotencyHandle, IdempotencyKey, IdempotencyLayer, RejectionCode, Tx,
    layer::Strategy,
    store::{RecordState, Store},
};
use uuid::Uuid;

pub(crate) use crate::support::db::Db;
use crate::support::{
    app::consumer,
    direct::{self, Answer},
    served::Count,
};

/// Two accounts and no charges.
pub(crate) struct Bank<DB: Db> {
    pub(crate) home: DB::Home,
    /// The application's.
    pub(crate) pool: Pool<DB>,
    pub(crate) store: Arc<dyn Store>,
    strategy: Strategy,
    watcher: Pool<DB>,
}

impl<DB: Db> Bank<DB> {
    pub(crate) async fn open() -> Self {
        let home = DB::home().await;
        let watcher = DB::pool(&home, 2);
        let pool = DB::pool(&home, 8);
        let bank = Self { store: DB::store(&pool), home, pool, strategy: Strategy::default(), watcher };
        bank.run(
            "CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);
            CREATE TABLE charges (amount INTEGER NOT NULL,
                account INTEGER REFERENCES accounts (id) DEFERRABLE INITIALLY DEFERRED);
            INSERT INTO accounts VALUES (1, 100), (2, 100)",
        )
        .await;
        // Some tests look whether a request waits for something, and the first one would wait for this.
        bank.store.prepare().await.unwrap();
        bank
    }

    /// The same bank, whose layers have this strategy.
    pub(crate) fn with_strategy(mut self, strategy: Strategy) -> Self {
        self.strategy = strategy;
        self
    }

    /// The same bank, whose application has so many connections.
    pub(crate) fn with_connections(mut self, connections: u32) -> Self {
        self.pool = DB::pool(&self.home, connections);
        self.store = DB::store(&self.pool);
        self
    }

    /// A layer whose lease is not over before the test is: what is free before that was released.
    pub(crate) fn layer(&self) -> IdempotencyLayer {
        IdempotencyLayer::new(Arc::clone(&self.store)).with_lease(LONG).with_strategy(self.strategy)
    }

    /// A node whose handler does this in its first run, and makes one charge in those after that.
    pub(crate) fn node<T: 'static>(&self, layer: IdempotencyLayer, first: impl Handler<T, ()>) -> Node {
        self.node_with(layer, first, |router| router)
    }

    /// A node with something between its layer and its handler.
    pub(crate) fn node_with<T: 'static>(
        &self,
        layer: IdempotencyLayer,
        first: impl Handler<T, ()>,
        inside: impl FnOnce(Router) -> Router,
    ) -> Node {
        let runs = Count::default();
        let counter = runs.clone();
        let handler = move |request: Request| {
            let (first, run) = (first.clone(), counter.add());
            async move {
                match run {
                    1 => first.call(request, ()).await,
                    _ => charge_once::<DB>.call(request, ()).await,
                }
            }
        };
        Node::new(layer, inside(Router::new().route("/charges", post(handler))), runs)
    }

    /// Checks what a request, its record and a retry come to, and how many charges the request leaves behind.
    pub(crate) async fn check(&self, node: &Node, answered: impl Into<Answered>, charges: i64, end: End) {
        self.check_key(node, &Uuid::new_v4().to_string(), answered.into(), charges, end).await;
    }

    async fn check_key(&self, node: &Node, key: &str, answered: Answered, charges: i64, end: End) {
        let (runs, before) = (node.runs.get(), self.charges().await);
        let first = node.send(key).await;
        answered.check(&first, end);
        node.until(key, end).await;
        assert_eq!(self.charges().await - before, charges, "charges made by {first:?}");
        let retry = node.send(key).await;
        match end {
            End::Stored => first.assert_same_replay(&retry),
            End::Released => assert!(retry.status == StatusCode::CREATED && !retry.is_replay(), "{retry:?}"),
            End::Held => retry.assert_refused(RejectionCode::OutcomeUnknown),
        }
        let again = i64::from(end == End::Released);
        assert_eq!(self.charges().await - before, charges + again, "charges made by the retry: {retry:?}");
        assert_eq!(node.runs.get() - runs, 1 + usize::from(end == End::Released), "runs");
    }

    pub(crate) async fn run(&self, sql: &str) {
        DB::run(&mut *self.watcher.acquire().await.unwrap(), sql).await.unwrap();
    }

    pub(crate) async fn number(&self, sql: &str) -> i64 {
        DB::number(&mut *self.watcher.acquire().await.unwrap(), sql).await.unwrap()
    }

    pub(crate) async fn charges(&self) -> i64 {
        self.number("SELECT count(*) FROM charges").await
    }
}

/// What the first answer is: the handler's own with this status, or the layer's.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answered {
    Own(u16),
    Refused(RejectionCode),
    /// Refused, and not worth a retry.
    Final(RejectionCode),
}

impl Answered {
    #[track_caller]
    fn check(self, answer: &Answer, end: End) {
        match self {
            Self::Own(status) => {
                assert_eq!((answer.status.as_u16(), answer.rejection), (status, None), "{answer:?}");
            }
            Self::Refused(code) => {
                answer.assert_refused(code);
                assert_eq!(answer.problem()["retryable"], end == End::Released, "{answer:?}");
            }
            Self::Final(code) => {
                answer.assert_refused(code);
                assert_eq!(answer.problem()["retryable"], false, "{answer:?}");
            }
        }
        assert!(!answer.is_replay());
    }
}

impl From<u16> for Answered {
    fn from(status: u16) -> Self {
        Self::Own(status)
    }
}

impl From<RejectionCode> for Answered {
    fn from(code: RejectionCode) -> Self {
        Self::Refused(code)
    }
}

/// What becomes of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Retries get the same response.
    Stored,
    /// A retry runs the handler again.
    Released,
    /// Retries are refused.
    Held,
}

/// A handler behind a layer.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    router: Router,
    pub(crate) handle: IdempotencyHandle,
    pub(crate) runs: Count,
}

impl Node {
    pub(crate) fn new(layer: IdempotencyLayer, router: Router, runs: Count) -> Self {
        Self { handle: layer.handle(), router: router.layer(layer), runs }
    }

    pub(crate) async fn send(&self, key: &str) -> Answer {
        self.send_request(direct::charge(key)).await
    }

    pub(crate) async fn send_request(&self, request: Request) -> Answer {
        timeout(PATIENCE, direct::send(&self.router, request)).await.expect("an answer")
    }

    pub(crate) fn start(&self, key: impl Into<String>) -> JoinHandle<Answer> {
        let (node, key) = (self.clone(), key.into());
        tokio::spawn(async move { node.send(&key).await })
    }

    /// Where the record stands; `None` while it is in progress.
    pub(crate) async fn end(&self, key: &str) -> Option<End> {
        let record = self.handle.get(&consumer(), &IdempotencyKey::new(key).unwrap()).await.unwrap();
        match record.map(|record| record.state) {
            None => Some(End::Released),
            Some(RecordState::Completed { .. }) => Some(End::Stored),
            Some(RecordState::Held) => Some(End::Held),
            Some(_) => None,
        }
    }

    /// Waits until the record is no longer in progress: an answer that is not stored does not wait for it.
    pub(crate) async fn until(&self, key: &str, end: End) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let reached = self.end(key).await;
            if reached.is_some() {
                return assert_eq!(reached, Some(end));
            }
            assert!(Instant::now() < deadline, "still in progress");
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Sends until the answer is no refusal because the request before it has not ended.
    pub(crate) async fn send_until_ended(&self, key: &str) -> Answer {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.send(key).await;
            if answer.rejection != Some(RejectionCode::InProgress) {
                return answer;
            }
            assert!(Instant::now() < deadline, "still in progress");
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Where handlers wait until the test opens it.
#[derive(Clone, Debug)]
pub(crate) struct Gate(Arc<(Semaphore, Semaphore)>);

impl Gate {
    pub(crate) fn new() -> Self {
        Self(Arc::new((Semaphore::new(0), Semaphore::new(0))))
    }

    pub(crate) async fn pass(&self) {
        self.0.0.add_permits(1);
        self.0.1.acquire().await.unwrap().forget();
    }

    /// Waits until one more handler is at the gate.
    pub(crate) async fn entered(&self) {
        timeout(PATIENCE, self.0.0.acquire()).await.expect("a handler").unwrap().forget();
    }

    pub(crate) fn open(&self) {
        self.0.1.add_permits(1000);
    }
}

/// Makes one charge and answers something that no other run answers.
pub(crate) async fn charge_once<DB: Db>(mut tx: Tx<DB>) -> Response {
    charge(&mut tx).await;
    unique(StatusCode::CREATED)
}

pub(crate) async fn charge<DB: Db>(tx: &mut Tx<DB>) {
    DB::run(tx, CHARGE).await.unwrap();
}

/// A response that no other run gives.
pub(crate) fn unique(status: StatusCode) -> Response {
    let [id, body] = [(); 2].map(|()| Uuid::new_v4().to_string());
    (status, [("x-id", id)], body).into_response()
}

/// Checks that this comes about within 1 s: it waits for no lock and no time-out.
pub(crate) async fn at_once<T>(work: impl Future<Output = T>) -> T {
    timeout(AT_ONCE, work).await.expect("it does not wait for anything")
}

/// Makes a test of each function, on each store with each strategy.
macro_rules! with_both_strategies {
    ($($test:ident),* $(,)?) => {
        $crate::bank::on_both_stores!($($test),*);

        mod single {$(
            mod $test {
                use tower_idempotency::layer::Strategy::SingleTransaction;

                #[tokio::test(flavor = "multi_thread")]
                async fn sqlite() {
                    let bank = $crate::bank::Bank::<sqlx::Sqlite>::open().await;
                    super::super::$test(bank.with_strategy(SingleTransaction)).await;
                }

                #[tokio::test(flavor = "multi_thread")]
                #[ignore = "needs PostgreSQL: run scripts/test"]
                async fn postgres() {
                    let bank = $crate::bank::Bank::<sqlx::Postgres>::open().await;
                    super::super::$test(bank.with_strategy(SingleTransaction)).await;
                }
            }
        )*}
    };
}
pub(crate) use with_both_strategies;

/// Makes a test of each function, on each store.
macro_rules! on_both_stores {
    ($($test:ident),* $(,)?) => {$(
        mod $test {
            #[tokio::test(flavor = "multi_thread")]
            async fn sqlite() {
                super::$test($crate::bank::Bank::<sqlx::Sqlite>::open().await).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            #[ignore = "needs PostgreSQL: run scripts/test"]
            async fn postgres() {
                super::$test($crate::bank::Bank::<sqlx::Postgres>::open().await).await;
            }
        }
    )*};
}
pub(crate) use on_both_stores;

pub(crate) const CHARGE: &str = "INSERT INTO charges (amount) VALUES (2000)";
pub(crate) const LONG: Duration = Duration::from_secs(100);
const AT_ONCE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(30);
