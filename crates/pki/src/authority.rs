//! A cluster's certificate authority.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

use crate::{
    Error, Identity, Role,
    tls::{self, MANAGER_NAME},
};

/// An authority outlives the machines it speaks for; it is replaced by rotation, not by running out.
const LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// Clocks of newcomers may be behind.
const SKEW: Duration = Duration::from_secs(3600);

/// Signs certificates. Does not show its key.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

fn validity(params: &mut CertificateParams, now: SystemTime, lifetime: Duration) {
    params.not_before = (now - SKEW).into();
    params.not_after = (now + lifetime).into();
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    ///
    /// Without randomness.
    pub fn generate(cluster: &str, now: SystemTime) -> Result<Self, Error> {
        let unusable = |error: rcgen::Error| Error::unusable("the authority", error);
        let key = KeyPair::generate().map_err(unusable)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, cluster);
        params.distinguished_name.push(DnType::CommonName, "Warren cluster authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity(&mut params, now, LIFETIME);
        let certificate = params.self_signed(&key).map_err(unusable)?.pem();
        Self::from_pem(&certificate, &key.serialize_pem())
    }

    /// The one of this certificate and key, in PEM.
    ///
    /// # Errors
    ///
    /// When they are none, or not of each other.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, Error> {
        let unusable = |error: rcgen::Error| Error::unusable("the authority", error);
        let key = KeyPair::from_pem(key).map_err(unusable)?;
        tls::check_authority(certificate, &rcgen::PublicKeyData::subject_public_key_info(&key))?;
        let issuer = Issuer::from_ca_cert_pem(certificate, key).map_err(unusable)?;
        Ok(Self { certificate: certificate.to_owned(), issuer })
    }

    /// Its certificate, in PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate
    }

    /// Its key, in PEM: whoever has it is the authority.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// Signs a request: its key, and nothing else of it, becomes `identity`'s. Returns the certificate in PEM.
    ///
    /// # Errors
    ///
    /// When the request is none, or was not made by the key in it.
    pub fn sign(
        &self,
        request: &str,
        identity: &Identity,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<String, Error> {
        let unusable = |error: rcgen::Error| Error::unusable("the certificate request", error);
        let request = CertificateSigningRequestParams::from_pem(request).map_err(unusable)?;
        // Managers are known by one name, whatever their addresses: which cluster's they are is the authority's to say.
        let names = if identity.role == Role::Manager { vec![MANAGER_NAME.to_owned()] } else { Vec::new() };
        let mut params = CertificateParams::new(names).map_err(unusable)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, identity.cluster.as_str());
        params.distinguished_name.push(DnType::OrganizationalUnitName, identity.role.name());
        params.distinguished_name.push(DnType::CommonName, identity.id.as_str());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if identity.role == Role::Manager {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        validity(&mut params, now, lifetime);
        Ok(params.signed_by(&request.public_key, &self.issuer).map_err(unusable)?.pem())
    }
}
