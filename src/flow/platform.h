/*-------------------------------------------------------------------------
 *
 * platform.h
 *	  Platforms and tasks: what SQL cannot do about them.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_PLATFORM_H
#define REDRIVE_PLATFORM_H

#include "postgres.h"

extern Oid	redrive_find_build_function(const char *name);

#endif							/* REDRIVE_PLATFORM_H */
