//! How handlers get their transaction, and when they do not.

use axum::{
    body::Body,
    extract::Request,
    http::{Method, StatusCode},
    response::Response,
};
use sqlx::Sqlite;
use tower::{ServiceBuilder, ServiceExt};
use tower_idempotency::{IdempotencyLayer, MemoryStore, RejectionCode, Tx, layer::RequestBody};

use crate::{
    bank::{Bank, Db, End, Node, charge, charge_once, unique, with_both_strategies},
    support::{
        direct::{charge as request_of, request},
        served::Count,
    },
};

with_both_strategies!(
    an_optional_transaction_is_there_if_there_is_a_key,
    without_a_key_there_is_no_transaction,
    a_transaction_that_was_dropped_is_extracted_again,
    a_transaction_is_not_given_twice,
    a_plain_service_gets_its_transaction_from_the_extensions,
);

async fn an_optional_transaction_is_there_if_there_is_a_key<DB: Db>(bank: Bank<DB>) {
    let handler = |tx: Option<Tx<DB>>| async move {
        match tx {
            Some(mut tx) => {
                charge(&mut tx).await;
                StatusCode::CREATED
            }
            None => StatusCode::NO_CONTENT,
        }
    };
    let without_key = request(Method::POST, None, "2000");
    let node = bank.node(bank.layer(), handler);
    assert_eq!(node.send_request(without_key).await.status, StatusCode::NO_CONTENT);
    assert_eq!(bank.charges().await, 0);
    bank.check(&bank.node(bank.layer(), handler), 201, 1, End::Stored).await;
}

async fn without_a_key_there_is_no_transaction<DB: Db>(bank: Bank<DB>) {
    let node = bank.node(bank.layer(), charge_once::<DB>);
    let answer = node.send_request(request(Method::POST, None, "2000")).await;
    answer.assert_refused(RejectionCode::KeyMissing);
    assert_eq!((answer.problem()["retryable"].as_bool(), bank.charges().await), (Some(false), 0));
}

async fn a_transaction_that_was_dropped_is_extracted_again<DB: Db>(bank: Bank<DB>) {
    let handler = |request: Request| async move {
        for _ in 0..3 {
            charge(&mut Tx::<DB>::begin(request.extensions()).await.unwrap()).await;
        }
        unique(StatusCode::CREATED)
    };
    bank.check(&bank.node(bank.layer(), handler), 201, 3, End::Stored).await;
    let handler = |request: Request| async move {
        for _ in 0..3 {
            charge(&mut Tx::<DB>::begin(request.extensions()).await.unwrap()).await;
        }
        StatusCode::INTERNAL_SERVER_ERROR
    };
    bank.check(&bank.node(bank.layer(), handler), 500, 0, End::Released).await;
}

async fn a_transaction_is_not_given_twice<DB: Db>(bank: Bank<DB>) {
    let handler = |mut tx: Tx<DB>, _: Tx<DB>| async move {
        charge(&mut tx).await;
        StatusCode::CREATED
    };
    let node = bank.node(bank.layer(), handler);
    bank.check(&node, RejectionCode::TransactionInUse, 0, End::Released).await;
    let handler = |request: Request| async move {
        let mut tx = Tx::<DB>::begin(request.extensions()).await.unwrap();
        charge(&mut tx).await;
        let error = Tx::<DB>::begin(request.extensions()).await.unwrap_err();
        assert_eq!(error.code(), RejectionCode::TransactionInUse);
        unique(StatusCode::CREATED)
    };
    bank.check(&bank.node(bank.layer(), handler), 201, 1, End::Stored).await;
}

async fn a_plain_service_gets_its_transaction_from_the_extensions<DB: Db>(bank: Bank<DB>) {
    let inner = tower::service_fn(|request: Request<RequestBody<Body>>| {
        let begun = Tx::<DB>::begin(request.extensions());
        async move {
            match begun.await {
                Ok(mut tx) => charge(&mut tx).await,
                Err(error) => {
                    return Ok::<_, std::convert::Infallible>(error.into_http_response().map(Body::from));
                }
            }
            Ok(Response::new(Body::from("fine")))
        }
    });
    let service = ServiceBuilder::new().layer(bank.layer()).service(inner);
    for _ in 0..2 {
        assert_eq!(service.clone().oneshot(request_of("k")).await.unwrap().status(), StatusCode::OK);
    }
    let refused = service.oneshot(request(Method::POST, None, "2000")).await.unwrap();
    assert_eq!((refused.status(), bank.charges().await), (StatusCode::BAD_REQUEST, 1));
}

/// SQLite's transactions use none either.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn handlers_without_a_transaction_use_no_connection_of_the_application() {
    let bank = Bank::<sqlx::Postgres>::open().await;
    let node = bank.node(bank.layer(), || async { unique(StatusCode::CREATED) });
    bank.check(&node, 201, 0, End::Stored).await;
    assert_eq!(bank.pool.size(), 0);
}

#[tokio::test]
async fn a_store_of_another_database_has_no_transaction() {
    refuses_as_misconfigured::<Sqlite>(IdempotencyLayer::new(MemoryStore::new())).await;
    refuses_as_misconfigured::<sqlx::Postgres>(Bank::<Sqlite>::open().await.layer()).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_postgres_store_has_no_transaction_of_sqlite() {
    refuses_as_misconfigured::<Sqlite>(Bank::<sqlx::Postgres>::open().await.layer()).await;
}

async fn refuses_as_misconfigured<DB: Db>(layer: IdempotencyLayer) {
    let router = axum::Router::new().route("/charges", axum::routing::post(charge_once::<DB>));
    let node = Node::new(layer, router, Count::default());
    for _ in 0..2 {
        let answer = node.send("k").await;
        answer.assert_refused(RejectionCode::StoreMisconfigured);
        assert_eq!(answer.problem()["retryable"], false);
    }
    assert_eq!(node.end("k").await, Some(End::Released));
}
