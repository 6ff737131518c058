/*-------------------------------------------------------------------------
 *
 * pg_redrive.c
 *	  Module entry point.
 *
 * Without preload the SQL functions and CALL redrive.work() work; shared
 * memory and workers exist only when the library is preloaded.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"

#include "base/compat.h"
#include "base/guc.h"
#include "base/secret_log.h"
#include "base/shmem.h"
#include "proc/launcher.h"
#include "proc/utility.h"

REDRIVE_MODULE_MAGIC;

void		_PG_init(void);

void
_PG_init(void)
{
	redrive_define_settings(process_shared_preload_libraries_in_progress);
	redrive_install_utility_hook();
	redrive_install_log_hook();
	if (!process_shared_preload_libraries_in_progress)
		return;
	redrive_install_shmem_hooks();
	redrive_register_launcher();
}
