//! One attempt, one run of the handler: a retry inside the layer does not inherit a transaction.

use std::convert::Infallible;

use axum::{
    Router,
    body::Body,
    extract::Request,
    handler::Handler,
    http::{Extensions, StatusCode, request::Parts},
    response::{IntoResponse, Response},
    routing::post,
};
use tower::{ServiceBuilder, ServiceExt, retry::RetryLayer};
use tower_idempotency::{Idempotency, RejectionCode, Tx, TxError};

use crate::{
    bank::{Bank, Db, End, Node, charge, charge_once, unique, with_both_strategies},
    support::{
        direct,
        rerun::{self, ONCE, RERUNS, Twice},
        served::Count,
    },
};

with_both_strategies!(
    a_second_run_of_the_handler_is_refused_and_nothing_is_committed,
    a_second_run_that_answers_success_without_its_transaction_commits_nothing,
    a_second_run_is_refused_without_extractors,
    a_second_run_is_refused_after_a_middleware_has_used_the_transaction,
    a_second_run_behind_a_first_that_used_nothing_is_performed,
    a_middleware_that_runs_the_handler_once_changes_nothing,
    what_a_handler_keeps_of_its_request_is_of_its_run,
    a_service_that_is_boxed_and_cloned_runs_once,
);

/// A node whose handler fails in its first run, with something inside its layer.
fn failing_first<DB: Db, T: 'static>(
    bank: &Bank<DB>,
    handler: impl Handler<T, ()>,
    inside: impl FnOnce(Router) -> Router,
) -> Node {
    let (router, runs) = rerun::failing_first(handler);
    Node::new(bank.layer(), inside(router), runs)
}

/// Checks that the first request is refused without a charge, and that a retry makes one.
async fn refused_then_performed<DB: Db>(bank: &Bank<DB>, node: &Node, what: &str) {
    let before = bank.charges().await;
    let key = uuid::Uuid::new_v4().to_string();
    let answer = node.send(&key).await;
    assert_eq!(answer.rejection, Some(RejectionCode::TransactionInUse), "{what}: {answer:?}");
    answer.assert_refused(RejectionCode::TransactionInUse);
    node.until(&key, End::Released).await;
    assert_eq!((node.runs.get(), bank.charges().await - before), (2, 0), "{what}");
    let retry = node.send_until_ended(&key).await;
    assert_eq!(retry.status, StatusCode::CREATED, "{what}: {retry:?}");
    assert_eq!(bank.charges().await - before, 1, "{what}");
}

async fn a_second_run_of_the_handler_is_refused_and_nothing_is_committed<DB: Db>(bank: Bank<DB>) {
    for (what, inside) in &RERUNS[..5] {
        refused_then_performed(&bank, &failing_first(&bank, charge_once::<DB>, inside), what).await;
    }
    let (what, hedge) = RERUNS[5];
    let node = failing_first(&bank, charge_once::<DB>, hedge);
    let before = bank.charges().await;
    let answer = node.send("hedged").await;
    node.until("hedged", End::Released).await;
    assert_eq!(answer.rejection, Some(RejectionCode::TransactionInUse), "{what}: {answer:?}");
    assert_eq!(bank.charges().await - before, 0);
}

async fn a_second_run_that_answers_success_without_its_transaction_commits_nothing<DB: Db>(bank: Bank<DB>) {
    for status in [StatusCode::CREATED, StatusCode::CONFLICT] {
        let handler = move |tx: Result<Tx<DB>, TxError>| async move {
            match tx {
                Ok(tx) => charge_once(tx).await,
                Err(_) => unique(status),
            }
        };
        refused_then_performed(&bank, &failing_first(&bank, handler, RERUNS[0].1), status.as_str()).await;
    }
}

async fn a_second_run_is_refused_without_extractors<DB: Db>(bank: Bank<DB>) {
    let late = |request: Request| async move {
        let mut tx = Tx::<DB>::begin(request.extensions()).await?;
        charge(&mut tx).await;
        Ok::<_, TxError>(unique(StatusCode::CREATED))
    };
    let kept = |extensions: Extensions, _: Idempotency| async move {
        let mut tx = Tx::<DB>::begin(&extensions).await?;
        charge(&mut tx).await;
        Ok::<_, TxError>(unique(StatusCode::CREATED))
    };
    for (what, inside) in &RERUNS[..5] {
        refused_then_performed(&bank, &failing_first(&bank, late, inside), what).await;
        refused_then_performed(&bank, &failing_first(&bank, kept, inside), what).await;
    }
}

async fn a_second_run_is_refused_after_a_middleware_has_used_the_transaction<DB: Db>(bank: Bank<DB>) {
    for (what, inside) in &RERUNS[..5] {
        let tenant = async |mut tx: Tx<DB>, request: Request, next: axum::middleware::Next| {
            DB::run(&mut tx, "UPDATE accounts SET balance = balance").await.unwrap();
            drop(tx);
            next.run(request).await
        };
        let around = |router| inside(router).layer(axum::middleware::from_fn(tenant));
        refused_then_performed(&bank, &failing_first(&bank, charge_once::<DB>, around), what).await;
    }
}

async fn a_second_run_behind_a_first_that_used_nothing_is_performed<DB: Db>(bank: Bank<DB>) {
    for (what, inside) in &RERUNS[..5] {
        let before = bank.charges().await;
        let runs = Count::default();
        let counter = runs.clone();
        let handler = move |_: Idempotency, request: Request| {
            let run = counter.add();
            async move {
                match run {
                    1 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
                    _ => charge_once::<DB>.call(request, ()).await,
                }
            }
        };
        let node = Node::new(bank.layer(), inside(Router::new().route("/charges", post(handler))), runs);
        let first = node.send(what).await;
        assert_eq!((first.status, node.runs.get()), (StatusCode::CREATED, 2), "{what}: {first:?}");
        first.assert_same_replay(&node.send(what).await);
        assert_eq!(bank.charges().await - before, 1);
    }
}

async fn a_middleware_that_runs_the_handler_once_changes_nothing<DB: Db>(bank: Bank<DB>) {
    for (_, inside) in ONCE {
        bank.check(&bank.node_with(bank.layer(), charge_once::<DB>, inside), 201, 1, End::Stored).await;
    }
    // It writes before and after the handler, in the handler's transaction.
    let audit = async |request: Request, next: axum::middleware::Next| {
        charge(&mut Tx::<DB>::begin(request.extensions()).await.unwrap()).await;
        let kept = request.extensions().clone();
        let response = next.run(request).await;
        charge(&mut Tx::<DB>::begin(&kept).await.unwrap()).await;
        response
    };
    let inside = |router: Router| router.layer(axum::middleware::from_fn(audit));
    bank.check(&bank.node_with(bank.layer(), charge_once::<DB>, inside), 201, 3, End::Stored).await;
}

async fn what_a_handler_keeps_of_its_request_is_of_its_run<DB: Db>(bank: Bank<DB>) {
    async fn twice<DB: Db>(mut tx: Tx<DB>, kept: Extensions) -> Response {
        charge(&mut tx).await;
        drop(tx);
        charge(&mut Tx::<DB>::begin(&kept).await.unwrap()).await;
        charge(&mut Tx::<DB>::begin(&kept.clone()).await.unwrap()).await;
        unique(StatusCode::CREATED)
    }

    let parts_first = |parts: Parts, tx: Tx<DB>| twice(tx, parts.extensions);
    let parts_last = |tx: Tx<DB>, parts: Parts| twice(tx, parts.extensions);
    let beside_key = |_: Idempotency, parts: Parts, tx: Option<Tx<DB>>, _: Idempotency| {
        twice(tx.unwrap(), parts.extensions)
    };
    let of_request = |tx: Tx<DB>, request: Request| twice(tx, request.into_parts().0.extensions);
    bank.check(&bank.node(bank.layer(), parts_first), 201, 3, End::Stored).await;
    bank.check(&bank.node(bank.layer(), parts_last), 201, 3, End::Stored).await;
    bank.check(&bank.node(bank.layer(), beside_key), 201, 3, End::Stored).await;
    bank.check(&bank.node(bank.layer(), of_request), 201, 3, End::Stored).await;
}

async fn a_service_that_is_boxed_and_cloned_runs_once<DB: Db>(bank: Bank<DB>) {
    let inner = tower::service_fn(|request: Request| async move {
        let begun = Tx::<DB>::begin(request.extensions()).await;
        let response = match begun {
            Ok(mut tx) => {
                charge(&mut tx).await;
                StatusCode::SERVICE_UNAVAILABLE.into_response()
            }
            Err(error) => error.into_response(),
        };
        Ok::<_, Infallible>(response)
    });
    let boxed = ServiceBuilder::new().boxed_clone().service(inner);
    let retried = ServiceBuilder::new()
        .layer(bank.layer())
        .map_request(|request: axum::http::Request<_>| request.map(Body::new))
        .layer(RetryLayer::new(Twice(true)))
        .service(boxed);
    let answer = retried.oneshot(direct::charge("k")).await.unwrap();
    assert_eq!((answer.status(), bank.charges().await), (StatusCode::INTERNAL_SERVER_ERROR, 0));
}
