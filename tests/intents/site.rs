//! A database, an upstream service, and handlers that call it.

use std::{
    sync::{Arc, Mutex},
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
use sqlx::Database;
use tokio::time::sleep;
use tower_idempotency::{
    Idempotency, IdempotencyLayer, Intent, IntentError, Lookup, Reconciler, RejectionCode, Resource,
    intent::{IntentBuilder, IntentFilter, IntentState},
    store::{RecoveryStore, Store},
};

use crate::{
    bank::{Answered, Bank, LONG, Node},
    support::{
        db::Db,
        direct::Answer,
        served::Count,
        upstream::{Upstream, UpstreamClient},
    },
};

pub(crate) struct Site<DB: Db> {
    pub(crate) bank: Bank<DB>,
    pub(crate) upstream: Upstream,
    /// How long handlers wait for the upstream.
    timeout: Arc<Mutex<Duration>>,
}

/// What a handler calls the upstream with. Clones share everything.
#[derive(Clone, Debug)]
pub(crate) struct Payer {
    client: UpstreamClient,
    deduplicates: bool,
    timeout: Arc<Mutex<Duration>>,
}

impl<DB: Db> Site<DB> {
    pub(crate) async fn open(upstream: Upstream) -> Self {
        Self { bank: Bank::open().await, upstream, timeout: Arc::new(Mutex::new(LONG)) }
    }

    /// Two sites: one whose upstream deduplicates, and one whose upstream does not.
    pub(crate) async fn both() -> [Self; 2] {
        [
            Self::open(Upstream::deduplicating().await).await,
            Self::open(Upstream::not_deduplicating().await).await,
        ]
    }

    pub(crate) fn payer(&self) -> Payer {
        Payer { timeout: Arc::clone(&self.timeout), ..Payer::of(&self.upstream) }
    }

    /// From now on handlers wait for the upstream for so long.
    pub(crate) fn wait_for_upstream(&self, timeout: Duration) {
        *self.timeout.lock().unwrap() = timeout;
    }

    /// A node whose handler pays, and answers with the transfer.
    pub(crate) fn paying(&self) -> Node {
        self.paying_through(&self.bank.store)
    }

    /// The same, over a store that has the site's behind it.
    pub(crate) fn paying_through(&self, store: &Arc<dyn Store>) -> Node {
        let payer = self.payer();
        self.node_on(store, move |idempotency: Idempotency| {
            let payer = payer.clone();
            async move { answer(payer.pay(&idempotency).await) }
        })
    }

    pub(crate) fn node<T: 'static>(&self, handler: impl Handler<T, ()>) -> Node {
        self.node_on(&self.bank.store, handler)
    }

    pub(crate) fn node_on<T: 'static>(&self, store: &Arc<dyn Store>, handler: impl Handler<T, ()>) -> Node {
        node(layer(store), handler, |router| router)
    }

    /// A node whose first run pays and then does this, and whose later runs pay and make a charge.
    pub(crate) fn node_after_paying<T: 'static>(&self, first: impl Handler<T, ()>) -> Node {
        let (payer, runs) = (self.payer(), Count::default());
        let handler = move |request: Request| {
            let (payer, first, run) = (payer.clone(), first.clone(), runs.add());
            async move {
                let idempotency = idempotency(&request);
                match (payer.pay(&idempotency).await, run) {
                    (Err(error), _) => error.into_response(),
                    (Ok(_), 1) => first.call(request, ()).await,
                    (Ok(transfer), _) => {
                        let mut tx = tower_idempotency::Tx::<DB>::begin(request.extensions()).await.unwrap();
                        crate::bank::charge(&mut tx).await;
                        created(&transfer)
                    }
                }
            }
        };
        self.node(handler)
    }

    pub(crate) fn recovery(&self) -> Arc<dyn RecoveryStore> {
        self.bank.store.recovery().unwrap()
    }

    /// The intent of the only key that the upstream was called with.
    pub(crate) async fn intent(&self) -> Intent {
        let mut keys: Vec<_> = self.upstream.requests().into_iter().map(|asked| asked.key).collect();
        keys.dedup();
        let [key] = keys[..] else { panic!("the upstream was called with the keys {keys:?}") };
        self.recovery().get_intent(key).await.unwrap().expect("what is called has an intent")
    }

    pub(crate) async fn intents(&self) -> i64 {
        self.bank.number("SELECT count(*) FROM idempotency_intents").await
    }

    /// Checks that the upstream has made one transfer, by so many calls with one key, and that this is recorded.
    pub(crate) async fn assert_paid_once(&self, calls: usize) {
        let transfers = self.upstream.transfers();
        assert_eq!((self.upstream.calls(), transfers.len()), (calls, 1), "{transfers:?}");
        assert_eq!(self.intent().await.state, IntentState::Finalized(Resource::new(&transfers[0].id)));
        assert_eq!(self.intents().await, 1);
    }

    /// Checks that nothing was called and no intent is there.
    pub(crate) async fn assert_untouched(&self) {
        assert_eq!((self.upstream.calls(), self.intents().await), (0, 0));
    }

    /// Every open intent is past its grace period.
    pub(crate) async fn let_dangle(&self) {
        let past = if DB::NAME == sqlx::Sqlite::NAME { "0" } else { "'epoch'" };
        let sql = format!(
            "UPDATE idempotency_intents SET dangling_at = {past}, look_at = {past} WHERE look_at IS NOT NULL"
        );
        self.bank.run(&sql).await;
    }

    /// Every lease is over.
    pub(crate) async fn end_leases(&self) {
        let past = if DB::NAME == sqlx::Sqlite::NAME { "0" } else { "'epoch'" };
        self.bank.run(&format!("UPDATE idempotency_records SET lease_until = {past}")).await;
    }

    /// Finds out what became of every open intent.
    pub(crate) async fn reconcile(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.recovery().list_intents(IntentFilter::Open, 1).await.unwrap().is_empty() {
            assert!(Instant::now() < deadline, "intents stay open");
            self.let_dangle().await;
            reconcile(&self.bank.store, &self.upstream).await;
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Sends until the answer is a success: what the handler has begun may go on after its answer.
    pub(crate) async fn send_until_created(&self, node: &Node, key: &str) -> Answer {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = node.send(key).await;
            if answer.status == StatusCode::CREATED {
                return answer;
            }
            assert!(Instant::now() < deadline, "still {answer:?}");
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Checks that the request succeeds at once, with the one transfer that there is, and is replayed.
    pub(crate) async fn assert_succeeds(&self, node: &Node, key: &str) {
        self.assert_success(node, key, node.send(key).await).await;
    }

    /// The same, as soon as what goes on in the background has come to its end.
    pub(crate) async fn assert_succeeds_at_last(&self, node: &Node, key: &str) {
        self.assert_success(node, key, self.send_until_created(node, key).await).await;
    }

    async fn assert_success(&self, node: &Node, key: &str, answer: Answer) {
        assert_answer(&answer, 201);
        let transfers = self.upstream.transfers();
        assert!(answer.body == transfers[0].id && transfers.len() == 1, "{answer:?} {transfers:?}");
        assert!(!answer.is_replay());
        answer.assert_same_replay(&node.send(key).await);
    }
}

impl Payer {
    pub(crate) fn of(upstream: &Upstream) -> Self {
        let timeout = Arc::new(Mutex::new(LONG));
        Self { client: upstream.client(), deduplicates: upstream.deduplicates(), timeout }
    }

    pub(crate) async fn pay(&self, idempotency: &Idempotency) -> Result<Resource, IntentError> {
        self.call(self.intent(idempotency).with_arguments(&("DE02", 1000))).await
    }

    pub(crate) fn intent(&self, idempotency: &Idempotency) -> IntentBuilder {
        let intent = idempotency.intent("bank.transfer").with_timeout(*self.timeout.lock().unwrap());
        if self.deduplicates { intent.deduplicates_for(DAY) } else { intent }
    }

    pub(crate) async fn call(&self, intent: IntentBuilder) -> Result<Resource, IntentError> {
        intent.call(async |key| self.client.transfer(key, "DE02 1000").await).await
    }
}

/// The layer of every node: no lease is over before the test is, and claims are not refused because the machine is slow.
pub(crate) fn layer(store: &Arc<dyn Store>) -> IdempotencyLayer {
    IdempotencyLayer::new(Arc::clone(store)).with_lease(LONG).with_store_timeout(PATIENCE)
}

/// A node that counts the runs of its handler, with something between its layer and its handler.
pub(crate) fn node<T: 'static>(
    layer: IdempotencyLayer,
    handler: impl Handler<T, ()>,
    inside: impl FnOnce(Router) -> Router,
) -> Node {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move |request: Request| {
        counter.add();
        handler.clone().call(request, ())
    };
    Node::new(layer, inside(Router::new().route("/charges", post(handler))), runs)
}

/// What the handlers answer.
pub(crate) fn answer(paid: Result<Resource, IntentError>) -> Response {
    match paid {
        Ok(transfer) => created(&transfer),
        Err(error) => error.into_response(),
    }
}

pub(crate) fn created(transfer: &Resource) -> Response {
    (StatusCode::CREATED, transfer.id.clone()).into_response()
}

pub(crate) fn idempotency(request: &Request) -> Idempotency {
    request.extensions().get::<Idempotency>().unwrap().clone()
}

/// Checks that this is the handler's own answer with this status, or the layer's refusal with this code.
#[track_caller]
pub(crate) fn assert_answer(answer: &Answer, expected: impl Into<Answered>) {
    match expected.into() {
        Answered::Own(status) => {
            assert_eq!((answer.status.as_u16(), answer.rejection), (status, None), "{answer:?}");
        }
        Answered::Refused(code) | Answered::Final(code) => answer.assert_refused(code),
    }
}

/// What a call comes to whose outcome is unknown.
pub(crate) fn unknown(upstream: &Upstream) -> RejectionCode {
    match upstream.deduplicates() {
        true => RejectionCode::OutcomePending,
        false => RejectionCode::OutcomeUnknown,
    }
}

/// Looks up what dangles, once.
pub(crate) async fn reconcile(store: &Arc<dyn Store>, upstream: &Upstream) {
    let (soon, client) = (Duration::from_millis(1), upstream.client());
    let look_up = move |intent: Intent| {
        let client = client.clone();
        async move {
            let found = client.look_up(intent.upstream_key).await?;
            Ok(found.map_or(Lookup::NotFound, |id| Lookup::Found(Resource::new(id))))
        }
    };
    let reconciler =
        Reconciler::new().on("bank.transfer", look_up).with_confirmation_after(soon).with_backoff(soon, soon);
    layer(store).handle().reconcile(&reconciler).await.unwrap();
}

/// Makes a test of each function, on each store.
macro_rules! on_both_stores {
    ($($test:ident),* $(,)?) => {$(
        mod $test {
            #[tokio::test(flavor = "multi_thread")]
            async fn sqlite() {
                super::$test::<sqlx::Sqlite>().await;
            }

            #[tokio::test(flavor = "multi_thread")]
            #[ignore = "needs PostgreSQL: run scripts/test"]
            async fn postgres() {
                super::$test::<sqlx::Postgres>().await;
            }
        }
    )*};
}
pub(crate) use on_both_stores;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
