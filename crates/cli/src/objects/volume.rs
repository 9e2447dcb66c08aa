//! Volumes.

use warren_proto::v1;

use crate::{
    client::{ClientArguments, all_pages},
    error::Error,
};

pub(crate) async fn list(client: &ClientArguments) -> Result<Vec<v1::Volume>, Error> {
    let mut api = client.volumes().await?;
    all_pages(async |page_token| {
        let page = api.list_volumes(v1::ListVolumesRequest { page_size: 0, page_token }).await?.into_inner();
        Ok((page.volumes, page.next_page_token))
    })
    .await
}
