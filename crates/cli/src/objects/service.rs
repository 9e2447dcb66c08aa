//! Services.

use warren_proto::v1;

use crate::{
    client::{ClientArguments, all_pages},
    error::Error,
};

pub(crate) async fn get(client: &ClientArguments, service: &str) -> Result<v1::Service, Error> {
    let request = v1::GetServiceRequest { service: service.to_owned() };
    Ok(client.services().await?.get_service(request).await?.into_inner().service.unwrap_or_default())
}

pub(crate) async fn list(client: &ClientArguments) -> Result<Vec<v1::Service>, Error> {
    let mut api = client.services().await?;
    all_pages(async |page_token| {
        let page = api.list_services(v1::ListServicesRequest { page_size: 0, page_token }).await?.into_inner();
        Ok((page.services, page.next_page_token))
    })
    .await
}
