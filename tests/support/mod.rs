//! What tests share: servers to break, a network to break, and clients that see every byte.

#![allow(dead_code, unreachable_pub, reason = "each test binary compiles its own copy and uses a part of it")]

pub mod app;
pub mod asked;
pub mod database;
pub mod db;
pub mod direct;
pub mod forward;
pub mod grouping;
pub mod http;
pub mod log;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod rerun;
pub mod schema;
pub mod served;
pub mod server;
pub mod sqlite;
pub mod upstream;
pub mod watched;

use std::{
    net::{Ipv4Addr, TcpListener},
    thread,
    time::{Duration, Instant},
};

use tower_idempotency::{
    Consumer, IdempotencyKey, StoreError,
    store::{Attempt, Claim, ClaimOutcome, Fingerprint, RecordId, Store, StoreErrorKind},
};

/// An environment variable that `scripts/test` sets.
///
/// # Panics
///
/// If it is not set: a test that needs it must not pass by doing nothing.
#[track_caller]
pub fn required_env(name: &str) -> String {
    match std::env::var(name) {
        Ok(value) => value,
        Err(_) => panic!("{name} is not set: run this test with scripts/test"),
    }
}

/// Blocks until the closure has an answer, for 30 s at most.
///
/// # Panics
///
/// If there is none by then; the text says what was waited for.
#[track_caller]
pub fn wait_for<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(answer) = attempt() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited 30 s in vain for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A port on which nothing listens, for a server that is to be stopped and started again. It is below those that the
/// kernel gives to outgoing connections: a client that keeps trying to reach a stopped server cannot be given it.
pub fn free_port() -> u16 {
    wait_for("a free port", || {
        let port = 20_000 + (uuid::Uuid::new_v4().as_u128() % 12_000) as u16;
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok().map(|_| port)
    })
}

/// A claim of `key` by a fresh attempt, with the defaults of the layer.
pub fn claim(key: &str) -> Claim {
    let consumer = Consumer::new("acme").expect("a name");
    let key = IdempotencyKey::new(key).expect("a key");
    Claim::new(Attempt::new(consumer, key), Fingerprint::from_bytes("fingerprint"))
}

/// Claims the key, which must be free.
pub async fn win(store: &impl Store, claim: &Claim) -> RecordId {
    let outcome = store.claim(claim).await.unwrap();
    let ClaimOutcome::Won { record_id, .. } = outcome else { panic!("{outcome:?}") };
    record_id
}

/// Checks that the error tells an operator what to do.
#[track_caller]
pub fn must_name(error: &StoreError, what: &str) {
    assert_eq!(error.kind(), StoreErrorKind::Misconfigured, "{error:?}");
    assert!(error.to_string().contains(what), "{error}");
}

/// Names that no SQL store takes for its tables.
pub fn names_to_quote() -> Vec<String> {
    let mut names =
        ["", "1a", "Orders", "a-b", "a b", "a\"b", "a;drop table b", "ä"].map(str::to_owned).to_vec();
    names.push("a".repeat(41));
    names
}
