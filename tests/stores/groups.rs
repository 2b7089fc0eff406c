//! Calls that share statements: that they do, and that each gets its own outcome.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use metrics::{Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use tokio::task::JoinSet;
use tower_idempotency::store::{
    Attempt, Claim, ClaimOutcome, CompleteOutcome, Fenced, Grouping, RecordState, Renewal, Store,
};

use crate::support::{
    claim,
    schema::{PooledSchema, Schema},
    sqlite::SqliteFile,
};

// One thread: the calls arrive before the first statement ends. Under load that statement may outlast their patience:
// then some go alone.
#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_calls_that_wait_share_a_statement() {
    let schema = Schema::create().await;
    share_statements(&schema.store().with_grouping(Grouping::default())).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn pgbouncer_calls_that_wait_share_a_statement() {
    let schema = PooledSchema::create().await;
    share_statements(&schema.store().with_grouping(Grouping::default())).await;
}

#[tokio::test]
async fn sqlite_calls_that_wait_share_a_statement() {
    let file = SqliteFile::new();
    share_statements(&file.store().with_grouping(Grouping::default())).await;
}

async fn share_statements(store: &(impl Store + Clone)) {
    let sizes = Sizes::default();
    let _recording = metrics::set_default_local_recorder(&sizes);
    store.prepare().await.unwrap();
    let claims: Vec<_> = (0..40).map(|number| claim(&format!("{number}"))).collect();
    for outcome in claim_all(store, &claims).await {
        assert!(matches!(outcome, ClaimOutcome::Won { attempt_number: 1, .. }), "{outcome:?}");
    }
    let mut completions = JoinSet::new();
    for claim in claims[..30].iter().cloned() {
        let store = store.clone();
        let response = Bytes::from(claim.attempt.key.as_str().repeat(50));
        completions.spawn(async move { store.complete(&claim.attempt, response).await.unwrap() });
    }
    for outcome in completions.join_all().await {
        assert!(matches!(outcome, CompleteOutcome::Completed), "{outcome:?}");
    }
    let mut releases = JoinSet::new();
    for claim in claims[30..].iter().cloned() {
        let store = store.clone();
        releases.spawn(async move { store.release(&claim.attempt).await.unwrap() });
    }
    assert_eq!(releases.join_all().await, [Fenced::Applied; 10]);
    let retries: Vec<_> = claims.iter().map(|won| claim(won.attempt.key.as_str())).collect();
    let outcomes = claim_all(store, &retries).await;
    for (retry, outcome) in retries.iter().zip(&outcomes[..30]) {
        assert_eq!(replayed(outcome), retry.attempt.key.as_str().repeat(50), "{outcome:?}");
    }
    for outcome in &outcomes[30..] {
        assert!(matches!(outcome, ClaimOutcome::Won { attempt_number: 1, .. }), "{outcome:?}");
    }
    for operation in ["claim", "complete", "release"] {
        let sizes = sizes.of(operation);
        assert!(sizes.iter().any(|size| *size >= 3.0), "few shared a {operation}: {sizes:?}");
        assert!(sizes.len() <= 10, "{operation}: {sizes:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_storms_on_two_stores_win_each_key_once() {
    for rows in [1, 2, 64] {
        let schema = Schema::create().await;
        storm([(); 2].map(|()| schema.store().with_grouping(Grouping::with_max_rows(rows)))).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn pgbouncer_storms_on_two_stores_win_each_key_once() {
    let schema = PooledSchema::create().await;
    storm([(); 2].map(|()| schema.store().with_grouping(Grouping::default()))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sqlite_storms_on_two_stores_win_each_key_once() {
    for rows in [1, 2, 64] {
        let file = SqliteFile::new();
        storm([(); 2].map(|()| file.store().with_grouping(Grouping::with_max_rows(rows)))).await;
    }
}

/// Fresh keys, then lapsed ones, then completed ones.
async fn storm<S: Store + Clone>(stores: [S; 2]) {
    for store in &stores {
        store.prepare().await.unwrap();
    }
    let fresh = won_once(&stores, |number| claim(&format!("{number}"))).await;
    assert!(fresh.values().all(|(_, number)| *number == 1), "{fresh:?}");
    let short = |(attempt, _): &(Attempt, u32)| Renewal::new(attempt.clone(), Duration::from_millis(1));
    stores[0].renew(&fresh.values().map(short).collect::<Vec<_>>()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let taken = won_once(&stores, |number| claim(&format!("{number}"))).await;
    assert!(taken.values().all(|(_, number)| *number == 2), "{taken:?}");
    let mut completions = JoinSet::new();
    for (attempt, _) in fresh.into_values().chain(taken.clone().into_values()) {
        let store = stores[0].clone();
        completions.spawn(async move {
            let response = Bytes::from(attempt.id.to_string());
            let outcome = store.complete(&attempt, response).await.unwrap();
            (attempt, matches!(outcome, CompleteOutcome::Completed))
        });
    }
    for (attempt, completed) in completions.join_all().await {
        assert_eq!(completed, taken[attempt.key.as_str()].0 == attempt, "{attempt:?}");
    }
    let retries: Vec<_> = (0..KEYS).map(|number| claim(&format!("{number}"))).collect();
    for (retry, outcome) in retries.iter().zip(claim_all(&stores[1], &retries).await) {
        let owner = &taken[retry.attempt.key.as_str()].0;
        assert_eq!(replayed(&outcome), owner.id.to_string(), "{outcome:?}");
    }
}

/// Claims each key four times on both stores. Returns the attempt that won it, and its number, by key.
async fn won_once<S: Store + Clone>(
    stores: &[S; 2],
    make: impl Fn(u32) -> Claim,
) -> BTreeMap<String, (Attempt, u32)> {
    let mut claims = JoinSet::new();
    for round in 0..4 {
        for number in 0..KEYS {
            let (store, claim) = (stores[(round + number as usize) % 2].clone(), make(number));
            claims.spawn(async move {
                let outcome = store.claim(&claim).await.unwrap();
                (claim.attempt, outcome)
            });
        }
    }
    let mut won = BTreeMap::new();
    for (attempt, outcome) in claims.join_all().await {
        if let ClaimOutcome::Won { attempt_number, .. } = outcome {
            let before = won.insert(attempt.key.as_str().to_owned(), (attempt, attempt_number));
            assert!(before.is_none(), "won twice: {before:?}");
        }
    }
    assert_eq!(won.len(), KEYS as usize);
    won
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn postgres_large_responses_come_back_whole() {
    let schema = Schema::create().await;
    large_responses(&schema.store().with_grouping(Grouping::default())).await;
}

#[tokio::test]
async fn sqlite_large_responses_come_back_whole() {
    let file = SqliteFile::new();
    large_responses(&file.store().with_grouping(Grouping::default())).await;
}

/// Small ones, some too large for the answer to a group, and some too large for a group.
async fn large_responses(store: &(impl Store + Clone)) {
    store.prepare().await.unwrap();
    let claims: Vec<_> = (0..30).map(|number| claim(&format!("{number}"))).collect();
    claim_all(store, &claims).await;
    let response = |number: usize| vec![u8::try_from(number).unwrap(); [100, 20_000, 1_500_000][number % 3]];
    let mut completions = JoinSet::new();
    for (number, claim) in claims.iter().cloned().enumerate() {
        let (store, response) = (store.clone(), Bytes::from(response(number)));
        completions.spawn(async move { store.complete(&claim.attempt, response).await.unwrap() });
    }
    for outcome in completions.join_all().await {
        assert!(matches!(outcome, CompleteOutcome::Completed), "{outcome:?}");
    }
    let retries: Vec<_> = (0..30).map(|number| claim(&format!("{number}"))).collect();
    for (number, outcome) in claim_all(store, &retries).await.iter().enumerate() {
        assert!(stored(outcome) == response(number), "the response of {number} came back changed");
    }
}

/// Claims all keys simultaneously.
pub(crate) async fn claim_all(store: &(impl Store + Clone), claims: &[Claim]) -> Vec<ClaimOutcome> {
    let mut tasks = JoinSet::new();
    for (number, claim) in claims.iter().cloned().enumerate() {
        let store = store.clone();
        tasks.spawn(async move { (number, store.claim(&claim).await.unwrap()) });
    }
    let mut outcomes = tasks.join_all().await;
    outcomes.sort_by_key(|(number, _)| *number);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

fn replayed(outcome: &ClaimOutcome) -> String {
    String::from_utf8(stored(outcome)).unwrap()
}

fn stored(outcome: &ClaimOutcome) -> Vec<u8> {
    let ClaimOutcome::Exists(record) = outcome else { panic!("{outcome:?}") };
    let RecordState::Completed { response, .. } = &record.state else { panic!("{record:?}") };
    response.to_vec()
}

/// The sizes of groups by operation.
#[derive(Default)]
struct Sizes(Mutex<BTreeMap<String, Arc<Values>>>);

#[derive(Default)]
struct Values(Mutex<Vec<f64>>);

impl Sizes {
    fn of(&self, operation: &str) -> Vec<f64> {
        self.0.lock().unwrap().get(operation).map_or_else(Vec::new, |values| values.0.lock().unwrap().clone())
    }
}

impl HistogramFn for Values {
    fn record(&self, value: f64) {
        self.0.lock().unwrap().push(value);
    }
}

impl Recorder for Sizes {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        assert_eq!(key.name(), "idempotency_group_size");
        let operation = key.labels().map(|label| label.value().to_owned()).collect();
        Histogram::from_arc(Arc::clone(self.0.lock().unwrap().entry(operation).or_default()))
    }
}

const KEYS: u32 = 100;
