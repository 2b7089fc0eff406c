//! The runs of the handler within one attempt, of which there may be one.
//!
//! A retry inside the layer runs the handler with a copy of the request that was made before the
//! first run used it. Extensions are copied with their request, so that a copy can note its
//! origin.

use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use crate::{
    attempt::Facts,
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode},
};

/// In the extensions of a request: the copy of it that has these extensions.
#[derive(Debug, Default)]
pub(crate) struct CopyOfRequest(Arc<RequestCopy>);

/// One copy of a request.
#[derive(Debug, Default)]
pub(crate) struct RequestCopy {
    /// The copy of which this one was made.
    original: Option<Arc<RequestCopy>>,
    /// Its uses of the attempt.
    uses: Uses,
    /// The transactions that were begun by its extensions, without an extractor.
    begins: Uses,
    /// An extractor has seen it: it is the request of a handler or a middleware, and not the
    /// extensions that one of them keeps.
    extracted: AtomicBool,
}

impl Clone for CopyOfRequest {
    fn clone(&self) -> Self {
        Self(Arc::new(RequestCopy {
            original: Some(Arc::clone(&self.0)),
            uses: self.0.uses.of_copy(),
            begins: self.0.begins.of_copy(),
            ..RequestCopy::default()
        }))
    }
}

/// The place of one copy in the order of uses, which are numbered from 1.
#[derive(Debug, Default)]
struct Uses {
    /// The last use by its originals before it was made: 0 if there was none.
    made_after: u64,
    /// Its own last use: 0 if there was none.
    last: AtomicU64,
}

impl Uses {
    fn last(&self) -> u64 {
        self.last.load(Ordering::SeqCst)
    }

    fn of_copy(&self) -> Self {
        Self { made_after: self.made_after.max(self.last()), ..Self::default() }
    }
}

impl RequestCopy {
    #[cfg(any(feature = "axum", feature = "sqlite", feature = "postgres"))]
    pub(crate) fn of(extensions: &http::Extensions) -> Option<Arc<Self>> {
        extensions.get::<CopyOfRequest>().map(|copy| Arc::clone(&copy.0))
    }

    /// The same, for an extractor.
    #[cfg(feature = "axum")]
    pub(crate) fn extracted_from(extensions: &http::Extensions) -> Option<Arc<Self>> {
        let copy = Self::of(extensions);
        copy.inspect(|copy| copy.extracted.store(true, Ordering::SeqCst))
    }

    fn is_extracted(&self) -> bool {
        self.extracted.load(Ordering::SeqCst)
    }

    /// The copies of which this one was made, from the last to the first.
    fn originals(self: &Arc<Self>) -> impl Iterator<Item = &Arc<Self>> {
        std::iter::successors(self.original.as_ref(), |copy| copy.original.as_ref())
    }

    /// The copy that stands for this one: extensions that were copied after the attempt was used
    /// belong to the run that has used it.
    fn representative(self: &Arc<Self>) -> &Arc<Self> {
        let mut copy = self;
        while let (Some(original), true, false) =
            (&copy.original, copy.uses.made_after > 0, copy.is_extracted())
        {
            copy = original;
        }
        copy
    }

    /// Both are of one run: the one is the request, and the other the extensions that its handler
    /// or a middleware has kept.
    fn is_kept_by_run_of(self: &Arc<Self>, request: &Arc<Self>) -> bool {
        let is = |one: &&Arc<Self>, other| Arc::ptr_eq(one, other);
        let of_handler =
            || self.originals().find(|copy| copy.is_extracted()).is_some_and(|copy| is(&copy, request));
        let of_middleware = || request.originals().any(|copy| is(&copy, self));
        request.is_extracted() && !self.is_extracted() && (of_handler() || of_middleware())
    }
}

/// The runs of the handler that have used its attempt.
#[derive(Debug, Default)]
pub(crate) struct Runs {
    used: Users,
    /// The copies by whose extensions a transaction was begun.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    begun: Users,
    second: OnceLock<Rejection>,
}

/// The copies that have used something.
#[derive(Debug, Default)]
struct Users(Mutex<Vec<Arc<RequestCopy>>>);

impl Users {
    /// Notes that a copy uses it. Returns `false` if one of another run has used it since the copy
    /// was made.
    fn note(
        &self,
        copy: &Arc<RequestCopy>,
        uses: impl Fn(&RequestCopy) -> &Uses,
        same_run: impl Fn(&Arc<RequestCopy>) -> bool,
    ) -> bool {
        let mut users = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = |other: &&Arc<RequestCopy>| uses(other).last() > uses(copy).made_after;
        if users.iter().filter(since).any(|other| !same_run(other)) {
            return false;
        }
        let last = users.iter().map(|other| uses(other).last()).max().unwrap_or(0);
        if uses(copy).last.swap(last + 1, Ordering::SeqCst) == 0 {
            users.push(Arc::clone(copy));
        }
        true
    }
}

impl Runs {
    /// Notes that the run with this copy uses the attempt. Returns `false` if another run has used
    /// it since the copy was made.
    fn enter(&self, copy: &Arc<RequestCopy>) -> bool {
        let copy = copy.representative();
        let same_run = |other: &Arc<_>| {
            Arc::ptr_eq(copy, other) || copy.is_kept_by_run_of(other) || other.is_kept_by_run_of(copy)
        };
        self.used.note(copy, |copy| &copy.uses, same_run)
    }

    /// Notes that a transaction is begun by the extensions of this copy. Returns `false` if one was
    /// begun by those of another since the copy was made. Behind a middleware that has extracted an
    /// attempt, copies that no extractor has seen cannot be told apart otherwise.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    fn begin(&self, copy: &Arc<RequestCopy>) -> bool {
        self.begun.note(copy, |copy| &copy.begins, |other| Arc::ptr_eq(copy, other))
    }

    /// The answer if a second run has used the attempt, whatever that run has answered.
    pub(crate) fn second(&self) -> Option<Rejection> {
        self.second.get().cloned()
    }
}

impl Facts {
    /// Lets the run with this copy of the request use the attempt. Returns `false` if it is a
    /// second run: the key is released then, with `code`, and no transaction is committed.
    pub(crate) fn enter_run(&self, copy: Option<&Arc<RequestCopy>>, code: RejectionCode) -> bool {
        // A handle that was not extracted is that of the run that uses it.
        copy.is_none_or(|copy| self.entered(self.runs.enter(copy), code))
    }

    /// The same for a transaction that is begun by the extensions of this copy.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn enter_run_by(&self, copy: Option<&Arc<RequestCopy>>, code: RejectionCode) -> bool {
        copy.is_none_or(|copy| self.entered(self.runs.enter(copy) && self.runs.begin(copy), code))
    }

    fn entered(&self, entered: bool, code: RejectionCode) -> bool {
        if !entered {
            tracing::error!(
                target: TRACING_TARGET, consumer = %self.attempt.consumer,
                key = %self.settings.shown(&self.attempt.key), attempt = %self.attempt.id, %code,
                "the handler runs a second time within one attempt, and is refused: retry outside of the \
                 IdempotencyLayer, in the client, or with TransactionOptions::with_reruns"
            );
            let _ = self.runs.second.set(Rejection::second_run(code));
        }
        entered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Request(CopyOfRequest);

    impl Request {
        fn new() -> Self {
            Self(CopyOfRequest::default())
        }

        fn extracted(&self) -> &Self {
            self.0.0.extracted.store(true, Ordering::SeqCst);
            self
        }

        fn enters(&self, runs: &Runs) -> bool {
            runs.enter(&self.0.0)
        }
    }

    #[test]
    fn a_copy_from_before_the_first_run_is_another_run() {
        for extract in [false, true] {
            let (runs, first) = (Runs::default(), Request::new());
            let (second, kept) = (first.clone(), first.clone());
            for request in [&first, &second] {
                if extract {
                    request.extracted();
                }
            }
            assert!(first.enters(&runs) && first.enters(&runs));
            assert!(!second.enters(&runs) && !second.clone().enters(&runs) && first.enters(&runs));
            let third = kept.clone();
            if extract {
                third.extracted();
            }
            assert!(!third.enters(&runs));
        }
    }

    #[test]
    fn copies_of_one_original_are_runs_of_their_own() {
        for extract in [false, true] {
            let (runs, original) = (Runs::default(), Request::new());
            // A middleware has read the key.
            original.extracted();
            let [first, second] = [(); 2].map(|()| original.clone());
            for request in [&first, &second] {
                if extract {
                    request.extracted();
                }
            }
            assert!(first.enters(&runs) && !second.enters(&runs));
            assert_eq!(original.enters(&runs), !extract, "the middleware itself");
        }
    }

    #[test]
    fn extensions_that_a_handler_keeps_are_of_its_run() {
        let (runs, request) = (Runs::default(), Request::new());
        let before = request.clone();
        assert!(request.extracted().enters(&runs));
        let after = request.clone();
        for kept in [&before, &after, &after.clone(), &request] {
            assert!(kept.enters(&runs));
        }
    }

    #[test]
    fn a_middleware_that_uses_the_attempt_before_a_retry_changes_nothing() {
        let (runs, request) = (Runs::default(), Request::new());
        assert!(request.enters(&runs));
        let [first, second] = [(); 2].map(|()| request.clone());
        assert!(first.extracted().enters(&runs) && !second.extracted().enters(&runs));
        assert!(request.enters(&runs));
    }
}
