use std::sync::Arc;

use tonic::{Request, Response, Status};
use warren_proto::v1::{self, operators_server};

use super::{Context, Error, lookup, pages::page};
use crate::{
    access::signing::{self, Invited},
    ids::OperatorId,
    messages::validate::{Invalid, object_name},
    state::{Change, Invitation, Operator, Transaction},
};

#[derive(Clone, Debug)]
pub(super) struct Operators(pub(super) Context);

fn shown(operator: &Operator) -> v1::Operator {
    v1::Operator {
        id: operator.id.to_string(),
        name: operator.name.clone(),
        created_at: Some(operator.created_at.to_proto()),
        invited_until: operator.invitation.as_ref().map(|invitation| invitation.expires_at.to_proto()),
    }
}

impl Operators {
    async fn create(&self, request: v1::CreateOperatorRequest) -> Result<v1::CreateOperatorResponse, Error> {
        object_name(&request.name)?;
        if request.name == "root" {
            return Err(Invalid::new("name", "is root, who works at the socket of a manager").into());
        }
        let (state, now) = (self.0.store.read().await?, self.0.environment.now());
        let Invited { token, hash, expires_at } = signing::invite(&state, &self.0.vault, now, request.lifetime)?;
        // Who did not come in time may be invited again.
        let late = state
            .operator_named(&request.name)
            .filter(|known| known.invitation.as_ref().is_some_and(|invitation| invitation.expires_at <= now));
        let again = late.map(|known| Change::DeleteOperator { id: known.id.clone() });
        let operator = Operator {
            id: OperatorId::generate(&*self.0.environment),
            name: request.name,
            created_at: now,
            invitation: Some(Invitation { hash, expires_at }),
        };
        let answer = shown(&operator);
        self.change(again.into_iter().chain([Change::CreateOperator(operator)]).collect()).await?;
        let managers = self.0.store.raft().status().members.into_iter().map(|member| member.address).collect();
        Ok(v1::CreateOperatorResponse { operator: Some(answer), token, managers })
    }

    async fn delete(&self, name: &str) -> Result<(), Error> {
        let id = lookup::operator(&self.0.store.read().await?, name)?.id.clone();
        self.change(vec![Change::DeleteOperator { id }]).await
    }

    async fn change(&self, changes: Vec<Change>) -> Result<(), Error> {
        self.0.store.transact(&Transaction { changes, ..Transaction::default() }).await?;
        Ok(())
    }
}

#[tonic::async_trait]
impl operators_server::Operators for Operators {
    async fn create_operator(
        &self,
        request: Request<v1::CreateOperatorRequest>,
    ) -> Result<Response<v1::CreateOperatorResponse>, Status> {
        Ok(Response::new(self.create(request.into_inner()).await?))
    }

    async fn list_operators(
        &self,
        request: Request<v1::ListOperatorsRequest>,
    ) -> Result<Response<v1::ListOperatorsResponse>, Status> {
        let request = request.into_inner();
        let state = self.0.store.read().await.map_err(super::status)?;
        let mut operators: Vec<_> = state.operators().map(Arc::clone).collect();
        operators.sort_by(|a, b| a.name.cmp(&b.name));
        let key = |operator: &Arc<Operator>| operator.name.clone();
        let (operators, next_page_token) =
            page(operators, key, (request.page_size, &request.page_token), |operator| Ok(shown(&operator)))?;
        Ok(Response::new(v1::ListOperatorsResponse { operators, next_page_token }))
    }

    async fn delete_operator(
        &self,
        request: Request<v1::DeleteOperatorRequest>,
    ) -> Result<Response<v1::DeleteOperatorResponse>, Status> {
        self.delete(&request.into_inner().operator).await?;
        Ok(Response::new(v1::DeleteOperatorResponse {}))
    }
}
