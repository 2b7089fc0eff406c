//! The calls that can share a statement: claims, completions and releases.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use uuid::Uuid;

use super::{
    Engine, Rank, all, applied,
    call::{Call, Statement},
    group::{Grouped, Item, Together},
    records::{shown, taken},
    rows::{Fields, required},
};
use crate::{
    error::StoreError,
    store::Store,
    stored::record::{Attempt, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordState},
};

/// A completion of a record by its attempt.
#[derive(Clone, Debug)]
pub(in crate::store) struct Completion {
    pub(in crate::store) attempt: Attempt,
    pub(in crate::store) response: Bytes,
}

/// A release of a key by its attempt.
#[derive(Clone, Debug)]
pub(in crate::store) struct Release(pub(in crate::store) Attempt);

impl Item for Claim {
    const OPERATION: &'static str = "claim";
    type Outcome = ClaimOutcome;

    fn attempt(&self) -> &Attempt {
        &self.attempt
    }

    fn bytes(&self) -> usize {
        self.fingerprint.as_bytes().len()
    }
}

impl<E: Engine> Grouped<E> for Claim {
    async fn alone(&self, engine: &E) -> Result<ClaimOutcome, StoreError> {
        for _ in 0..CLAIM_ROUNDS {
            // Without an outcome, another claim came between. The next round sees its record.
            if let Some(outcome) = engine.try_claim(self).await? {
                return Ok(outcome);
            }
        }
        Ok(ClaimOutcome::Contended)
    }

    async fn together(claims: &[Self], engine: &E) -> Together<ClaimOutcome> {
        let rows = engine.claim_together(claims).await?;
        outcomes(claims, &rows).map_err(|source| E::error(Self::OPERATION, source))
    }
}

/// Returns the outcomes of claims by the records of their keys. A record that is `open` and was not
/// `written` decides nothing.
fn outcomes(claims: &[Claim], rows: &[impl Fields]) -> Result<Vec<Option<ClaimOutcome>>, sqlx::Error> {
    let place = |(place, claim): (usize, &Claim)| {
        ((claim.attempt.consumer.as_str().to_owned(), claim.attempt.key.as_str().to_owned()), place)
    };
    let places: HashMap<_, _> = claims.iter().enumerate().map(place).collect();
    let mut outcomes = vec![None; claims.len()];
    for row in rows {
        let key = (required(row.text("consumer")?)?, required(row.text("key")?)?);
        let Some(place) = places.get(&key) else { continue };
        if row.flag("written")? {
            outcomes[*place] = taken(std::slice::from_ref(row))?;
        } else if !row.flag("open")? {
            outcomes[*place] = shown(row)?;
        }
    }
    Ok(outcomes)
}

impl Item for Completion {
    const OPERATION: &'static str = "complete";
    type Outcome = CompleteOutcome;

    fn attempt(&self) -> &Attempt {
        &self.attempt
    }

    fn bytes(&self) -> usize {
        self.response.len()
    }
}

impl<E: Engine> Grouped<E> for Completion {
    async fn alone(&self, engine: &E) -> Result<CompleteOutcome, StoreError> {
        let (attempt, statement) = (&self.attempt, &engine.statements().await?.records.complete);
        let call = Call::new(statement).of_attempt(attempt).with("response", &*self.response);
        if engine.change(Rank::Owner, Self::OPERATION, call).await? > 0 {
            return Ok(CompleteOutcome::Completed);
        }
        // The record tells why: a repeated completion, for example, finds it completed.
        Ok(not_completed(attempt, engine.get(&attempt.consumer, &attempt.key).await?))
    }

    async fn together(completions: &[Self], engine: &E) -> Together<CompleteOutcome> {
        let rows = engine.complete_together(completions).await?;
        let completed = attempts::<E>(Self::OPERATION, &rows)?;
        let outcome = |completion: &Self| {
            completed.contains(&completion.attempt.id.as_uuid()).then_some(CompleteOutcome::Completed)
        };
        Ok(completions.iter().map(outcome).collect())
    }
}

impl Item for Release {
    const OPERATION: &'static str = "release";
    type Outcome = Fenced;

    fn attempt(&self) -> &Attempt {
        &self.0
    }

    fn bytes(&self) -> usize {
        0
    }
}

impl<E: Engine> Grouped<E> for Release {
    async fn alone(&self, engine: &E) -> Result<Fenced, StoreError> {
        let records = &engine.statements().await?.records;
        // Deletes first: a record that becomes retained between the two statements is then left by
        // the second one, and never deleted.
        match fenced(engine, Self::OPERATION, &records.release, &self.0).await? {
            Fenced::Applied => Ok(Fenced::Applied),
            Fenced::Lost => fenced(engine, Self::OPERATION, &records.release_retained, &self.0).await,
        }
    }

    async fn together(releases: &[Self], engine: &E) -> Together<Fenced> {
        let rows = engine.release_together(releases).await?;
        let released = attempts::<E>(Self::OPERATION, &rows)?;
        let outcome = |release: &Self| released.contains(&release.0.id.as_uuid()).then_some(Fenced::Applied);
        Ok(releases.iter().map(outcome).collect())
    }
}

/// Returns the attempts that rows name.
fn attempts<E: Engine>(operation: &str, rows: &[E::Row]) -> Result<HashSet<Uuid>, StoreError> {
    Ok(all::<E, _>(operation, rows, |row| required(row.uuid("attempt")?))?.into_iter().collect())
}

pub(super) async fn fenced<E: Engine>(
    engine: &E,
    operation: &str,
    statement: &Statement,
    attempt: &Attempt,
) -> Result<Fenced, StoreError> {
    let call = Call::new(statement).of_attempt(attempt);
    Ok(applied(engine.change(Rank::Owner, operation, call).await?))
}

/// Returns the outcome of a completion that changed nothing, by the record that was found.
fn not_completed(attempt: &Attempt, found: Option<Record>) -> CompleteOutcome {
    match found {
        None => CompleteOutcome::Absent,
        Some(record)
            if record.attempt == Some(attempt.id)
                && matches!(record.state, RecordState::Completed { .. }) =>
        {
            CompleteOutcome::Completed
        }
        Some(record) => CompleteOutcome::Lost(Box::new(record)),
    }
}

/// The number of times that a claim asks the database alone before it answers
/// [`Contended`](crate::store::ClaimOutcome::Contended).
const CLAIM_ROUNDS: u32 = 3;
