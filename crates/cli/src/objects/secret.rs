//! Secrets and configs.

use warren_proto::v1::{self, SecretKind};

use crate::{
    client::{ClientArguments, all_pages},
    error::Error,
};

pub(crate) async fn list(client: &ClientArguments, kind: SecretKind) -> Result<Vec<v1::Secret>, Error> {
    let mut api = client.secrets().await?;
    all_pages(async |page_token| {
        let request = v1::ListSecretsRequest { kind: kind.into(), page_size: 0, page_token };
        let page = api.list_secrets(request).await?.into_inner();
        Ok((page.secrets, page.next_page_token))
    })
    .await
}
