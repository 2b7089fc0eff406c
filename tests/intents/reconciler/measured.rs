//! What is counted.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use tower_idempotency::Reaper;

use super::lookups::dangle;
use crate::payouts::{Bank, Node, Say, Transfer, World, until};

/// Values by name and label.
#[derive(Default)]
struct Values(Mutex<HashMap<String, Arc<AtomicU64>>>);

impl Values {
    fn at(&self, name: &str) -> Arc<AtomicU64> {
        Arc::clone(self.0.lock().unwrap().entry(name.to_owned()).or_default())
    }

    fn counter(&self, name: &str) -> u64 {
        self.at(name).load(Ordering::SeqCst)
    }

    fn gauge(&self, name: &str) -> f64 {
        f64::from_bits(self.counter(name))
    }
}

impl Recorder for Values {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        let labels = key.labels().map(|label| format!(" {}={}", label.key(), label.value()));
        Counter::from_arc(self.at(&format!("{}{}", key.name(), labels.collect::<String>())))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.at(key.name()))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

// One thread, which has a recorder of its own.
#[tokio::test]
async fn lookups_open_intents_and_purged_rows_are_counted() {
    let values = Values::default();
    let _recording = metrics::set_default_local_recorder(&values);
    let world = World::<sqlx::Sqlite>::open().await;
    let bank = Bank::default();
    let node = world.node(&bank);
    let lookups =
        |outcome: &str| values.counter(&format!("idempotency_intent_lookups_total outcome={outcome}"));
    let answers = [
        ("found", &[Say::Found][..]),
        ("absent", &[Say::NotFound]),
        ("turns up", &[Say::NotFound, Say::NotFound, Say::Found]),
        ("unknown", &[Say::Unknown]),
    ];
    for (name, says) in answers {
        dangle(&world, &node, &bank, name).await;
        bank.says(name, says);
    }
    let reconciler = bank.reconciler().with_max_lookups(3);
    node.handle.reconcile(&reconciler).await.unwrap();
    let intents = |what: &str| values.gauge(&format!("idempotency_intents_{what}"));
    assert_eq!((intents("open"), intents("dangling"), intents("need_attention")), (3.0, 3.0, 0.0));
    assert!(intents("oldest_seconds") >= 86_400.0, "{}", intents("oldest_seconds"));
    for _ in 0..2 {
        world.age_intents().await;
        node.handle.reconcile(&reconciler).await.unwrap();
    }
    assert_eq!((lookups("found"), lookups("again"), lookups("absent")), (1, 4, 2));
    assert_eq!((lookups("turned_up"), lookups("closed"), lookups("attention")), (1, 1, 1));
    assert_eq!(values.counter("idempotency_intents_turned_up_total"), 1);
    assert_eq!((intents("open"), intents("need_attention")), (1.0, 2.0));

    let reaper = Reaper::every(Duration::from_millis(20), 2).with_intent_retention(Duration::from_secs(3600));
    let reaping = Node::new(Arc::clone(&world.store), &bank, reaper);
    bank.transfers(Transfer::Made);
    assert_eq!(reaping.pay("any").await.status, axum::http::StatusCode::CREATED);
    world.age_intents().await;
    world.expire_records().await;
    let purged = |what: &str| values.counter(&format!("idempotency_purged_total what={what}"));
    // All but what is open or needs attention.
    until("all is purged", async || (purged("records"), purged("settled")) == (4, 3)).await;
    reaping.handle.drain(Duration::from_secs(30)).await.unwrap();
}
