//! What was checked, how often, and what was found.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// One promise, checked many times. Clones share everything.
#[derive(Clone, Debug)]
pub struct Check(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    what: String,
    held: AtomicUsize,
    broken: AtomicUsize,
}

impl Check {
    pub fn new(what: impl Into<String>) -> Self {
        Self(Arc::new(Counts { what: what.into(), held: 0.into(), broken: 0.into() }))
    }

    /// Counts one case, which was in order if this is `true`.
    pub fn that(&self, in_order: bool, key: &str, found: impl fmt::Display) {
        if in_order {
            self.0.held.fetch_add(1, Ordering::SeqCst);
        } else {
            self.fail(key, found);
        }
    }

    /// Counts a case that was not in order.
    pub fn fail(&self, key: &str, found: impl fmt::Display) {
        self.0.broken.fetch_add(1, Ordering::SeqCst);
        VIOLATIONS.fetch_add(1, Ordering::SeqCst);
        println!("VIOLATION: {}: {key}: {found}", self.0.what);
    }

    /// The summary: with no failure in N cases the rate of failures is below 3/N, at a confidence of 95 %.
    pub fn print(&self) {
        let Counts { what, held, broken } = &*self.0;
        let broken = broken.load(Ordering::SeqCst);
        let count = held.load(Ordering::SeqCst) + broken;
        let bound = match (broken, count) {
            (0, 1..) => format!("95 % bound 3/{count}"),
            _ => "no bound".to_owned(),
        };
        println!("{what}: N = {count}, failures {broken}, {bound}");
        if count == 0 {
            self.fail("-", "nothing was checked");
        }
    }
}

/// Whether every check has held.
pub fn all_held() -> bool {
    VIOLATIONS.load(Ordering::SeqCst) == 0
}

static VIOLATIONS: AtomicUsize = AtomicUsize::new(0);
