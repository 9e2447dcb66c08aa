// Every file that is rendered, by its path below deploy/.
local mixin = import 'mixin.libsonnet';
{
  'prometheus/alerts.yaml':
    '# Rendered from deploy/mixin: `cargo xtask mixin`.\n' + std.manifestYamlDoc(mixin.prometheusAlerts, quote_keys=false) + '\n',
} + {
  ['grafana/' + name]: std.manifestJsonEx(mixin.grafanaDashboards[name], '  ') + '\n'
  for name in std.objectFields(mixin.grafanaDashboards)
}
