//! One look for abandoned requests.

use std::sync::Arc;

use http::StatusCode;
use tokio::task::JoinSet;

use crate::recovery::completer::{Completer, send::Passed};
use crate::{
    error::StoreError,
    metrics,
    node::Node,
    redact::TRACING_TARGET,
    rejection::RejectionCode,
    stored::{
        record::{Fenced, Record, RecordState},
        request::{KeptRequest, RequestUpdate},
    },
};

/// What one pass of a [`Completer`] came to: how many requests each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompleterPass {
    /// Were taken.
    pub taken: u64,
    /// Are completed.
    pub completed: u64,
    /// Are not completed, and are sent again later.
    pub again: u64,
    /// Are held until an intent is settled or an operator resolves them.
    pub held: u64,
    /// Had lost their record: it had expired and was purged, or its key is used for another request.
    pub gone: u64,
    /// Need attention now: an operator must look at them.
    pub need_attention: u64,
    /// Could not be looked after because of an error of the store, and are taken again later.
    pub failed: u64,
}

/// What became of one request.
#[derive(Debug)]
enum Fate {
    Completed,
    SendAgain(String),
    /// It was not sent, or an attempt is running.
    Later(String),
    Held,
    Gone,
    NeedsAttention(String),
}

impl Completer {
    /// Sends abandoned requests again, at most a batch.
    pub(crate) async fn pass(&self, node: &Arc<Node>) -> Result<CompleterPass, StoreError> {
        let (mut counts, mut left) = (CompleterPass::default(), self.batch);
        let (mut under_way, mut failure) = (JoinSet::new(), None);
        loop {
            let running = u32::try_from(under_way.len()).unwrap_or(u32::MAX);
            let free = self.concurrency.saturating_sub(running).min(left);
            if free > 0 && !node.tasks.is_draining() {
                let taken = self.take(node, free).await.unwrap_or_else(|error| {
                    failure = Some(error);
                    Vec::new()
                });
                left = if taken.len() < free as usize { 0 } else { left - free };
                for request in taken {
                    counts.taken += 1;
                    let (this, node) = (self.clone(), Arc::clone(node));
                    let tasks = node.tasks.clone();
                    under_way.spawn(tasks.track(async move { this.complete(&node, &request).await }));
                }
            }
            match under_way.join_next().await {
                None => return failure.map_or(Ok(counts), Err),
                Some(ended) => counts.add(ended.ok().flatten().as_ref()),
            }
        }
    }

    async fn take(&self, node: &Arc<Node>, limit: u32) -> Result<Vec<KeptRequest>, StoreError> {
        let (recovery, pause) = (node.recovery()?, self.backoff.first());
        node.tasks.run_to_end(async move { recovery.take_abandoned(limit, pause).await }).await
    }

    /// Sends one request, and writes down what became of it. `None` after an error of the store: then it is taken again.
    async fn complete(&self, node: &Arc<Node>, request: &KeptRequest) -> Option<Fate> {
        let completed = match self.fate(node, request).await {
            Ok(fate) => self.note(node, request, &fate).await.map(|()| fate),
            Err(error) => Err(error),
        };
        completed
            .inspect_err(|error| {
                let error = error as &dyn std::error::Error;
                tracing::warn!(
                    target: TRACING_TARGET, consumer = %request.consumer, record = %request.record_id, error,
                    "an abandoned request could not be looked after; trying again later"
                );
            })
            .ok()
    }

    async fn fate(&self, node: &Arc<Node>, request: &KeptRequest) -> Result<Fate, StoreError> {
        if request.tries > self.max_tries {
            let what = format!("it was sent {} times and nothing is known of the last one", self.max_tries);
            return Ok(Fate::NeedsAttention(what));
        }
        if node.tasks.is_draining() {
            return Ok(Fate::Later("the server is shutting down".to_owned()));
        }
        // From now on a failure does not delete the record, which nobody but the completer would then perform again.
        let (recovery, kept) = (node.recovery()?, request.clone());
        let keep = async move { recovery.retain_record(&kept.consumer, &kept.key, kept.record_id).await };
        if node.tasks.run_to_end(keep).await? == Fenced::Lost {
            let record = record_of(node, request).await?;
            return Ok(ended(record.as_ref()).unwrap_or(Fate::Later("its record was changed".to_owned())));
        }
        let passed = self.pass_on(request).await;
        let record = record_of(node, request).await?;
        Ok(ended(record.as_ref()).unwrap_or_else(|| self.not_completed(request, record.as_ref(), passed)))
    }

    /// What becomes of a request whose record is still in progress.
    fn not_completed(&self, request: &KeptRequest, record: Option<&Record>, passed: Passed) -> Fate {
        let (passage, status, what) = match passed {
            Passed::Never(what) => return Fate::NeedsAttention(what),
            Passed::NotYet(what) => return self.again_or_not(request, what),
            Passed::Through { passage, status, what } => (passage, status, what),
        };
        if !passage.was_reached() && !status.is_some_and(is_turned_away) {
            let unguarded = "no idempotency layer guards its route any more: it may be performed without one";
            return Fate::NeedsAttention(format!("{unguarded}; {what}"));
        }
        match passage.refusal() {
            Some(RejectionCode::KeyReused) => {
                let what = "it is not the request of its record any more: its fingerprint is another one";
                Fate::NeedsAttention(what.to_owned())
            }
            _ if is_owned(record) => Fate::Later("an attempt is running".to_owned()),
            Some(RejectionCode::ShuttingDown) => Fate::Later(what),
            Some(code) => self.again_or_not(request, format!("{what}: {code}")),
            None if passage.was_reached() && status.is_some_and(|status| status.is_client_error()) => {
                let what = "answered before any intent or phase, and not stored: it may lack a header, see KeptRequests";
                Fate::NeedsAttention(format!("{what} ({})", shown(status)))
            }
            None => self.again_or_not(request, what),
        }
    }

    fn again_or_not(&self, request: &KeptRequest, what: String) -> Fate {
        match request.tries < self.max_tries {
            true => Fate::SendAgain(what),
            false => {
                Fate::NeedsAttention(format!("not completed after {} tries; the last: {what}", request.tries))
            }
        }
    }

    async fn note(&self, node: &Arc<Node>, request: &KeptRequest, fate: &Fate) -> Result<(), StoreError> {
        let (consumer, record, tries) = (&request.consumer, request.record_id, request.tries);
        let update = match fate {
            Fate::Held => return Ok(()),
            Fate::Completed | Fate::Gone => RequestUpdate::Done,
            Fate::SendAgain(what) => {
                let pause = self.backoff.after(tries);
                tracing::warn!(target: TRACING_TARGET, %consumer, %record, tries, what, ?pause, "not completed; sent again later");
                RequestUpdate::SendAgain { after: pause, tried: true }
            }
            Fate::Later(what) => {
                tracing::debug!(target: TRACING_TARGET, %consumer, %record, tries, what, "not sent; sent again later");
                RequestUpdate::SendAgain { after: self.backoff.first(), tried: false }
            }
            Fate::NeedsAttention(what) => {
                tracing::error!(target: TRACING_TARGET, %consumer, %record, tries, what, "an abandoned request needs attention");
                RequestUpdate::NeedsAttention(what.clone())
            }
        };
        if matches!(fate, Fate::Completed) {
            tracing::info!(target: TRACING_TARGET, %consumer, %record, tries, "an abandoned request is completed");
        }
        let recovery = node.recovery()?;
        node.tasks
            .run_to_end(async move { recovery.update_request(record, Some(tries), &update).await })
            .await
            .map(drop)
    }
}

impl CompleterPass {
    fn add(&mut self, fate: Option<&Fate>) {
        let (count, outcome) = match fate {
            Some(Fate::Completed) => (&mut self.completed, "completed"),
            Some(Fate::SendAgain(_) | Fate::Later(_)) => (&mut self.again, "again"),
            Some(Fate::Held) => (&mut self.held, "held"),
            Some(Fate::Gone) => (&mut self.gone, "gone"),
            Some(Fate::NeedsAttention(_)) => (&mut self.need_attention, "attention"),
            None => (&mut self.failed, "failed"),
        };
        *count += 1;
        metrics::sent_again(outcome);
    }
}

/// The record that the request was kept for, if it is still there.
async fn record_of(node: &Arc<Node>, request: &KeptRequest) -> Result<Option<Record>, StoreError> {
    let (store, kept) = (Arc::clone(&node.store), request.clone());
    let found = node.tasks.run_to_end(async move { store.get(&kept.consumer, &kept.key).await }).await?;
    Ok(found.filter(|record| record.id == request.record_id))
}

/// What became of a request, if its record says so.
fn ended(record: Option<&Record>) -> Option<Fate> {
    match record.map(|record| &record.state) {
        None => Some(Fate::Gone),
        Some(RecordState::Completed { .. }) => Some(Fate::Completed),
        Some(RecordState::Held) => Some(Fate::Held),
        Some(RecordState::InProgress { .. }) => None,
    }
}

fn is_owned(record: Option<&Record>) -> bool {
    let state = record.map(|record| &record.state);
    matches!(state, Some(RecordState::InProgress { lease_remaining }) if !lease_remaining.is_zero())
}

/// Answers of layers outside, which have not performed it.
fn is_turned_away(status: StatusCode) -> bool {
    matches!(status.as_u16(), 401 | 403 | 407 | 408 | 413 | 421 | 425 | 429 | 503)
}

fn shown(status: Option<StatusCode>) -> String {
    status.map_or_else(|| "no answer".to_owned(), |status| status.to_string())
}
